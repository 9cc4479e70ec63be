"""``slimrank export``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json
from slimrank.errors import RecipeError
from slimrank.exporting import export_dense
from slimrank.exporting_code import export_remote_code
from slimrank.report import ExportReport, RemoteCodeReport

WAYS: dict[str, Callable[[Path, Path], ExportReport | RemoteCodeReport]] = {
    "dense": export_dense,
    "remote-code": export_remote_code,
}


@friendly
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that slimrank wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="'dense': an ordinary checkpoint with the factors multiplied out, for conversion "
            "to GGUF and for any other tool. 'remote-code': a copy with a small modelling file, "
            "which transformers runs with trust_remote_code."
        ),
    ] = "dense",
    json: opt.Json = False,
) -> None:
    """Write a compressed DIR in a form that needs no slimrank, as OUT."""
    if to not in WAYS:
        raise RecipeError(f"--to is '{to}'; it is one of {', '.join(WAYS)}")
    report = WAYS[to](folder, out)
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    typer.echo(report.line())
    typer.echo(f"wrote {out}")
