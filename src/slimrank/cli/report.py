"""``slimrank report``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json
from slimrank.pages import read_shown, render, require_free, write_page


@friendly
def report_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder with a report.json or a frontier.json."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page to write. [default: DIR/report.html]"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a page that is there already.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Make one HTML page of a compressed DIR, or of a frontier: pictures, tables, recipe.

    The page is a single file without scripts; it can be opened, sent and printed as it is.
    """
    page = out or folder / "report.html"
    require_free(page, force)
    shown = read_shown(folder)
    write_page(render(shown), page, force)
    if json:
        print_json(shown.model_dump_json(indent=1, by_alias=True))
        return
    typer.echo(f"wrote {page}")
