"""``slimrank export``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json
from slimrank.exporting import export


@friendly
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that slimrank wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="'dense': an ordinary checkpoint with the factors multiplied out, for conversion "
            "to GGUF and for any other tool; 'onnx' or 'openvino': a graph of the factors, with a "
            "cache, for onnxruntime or OpenVINO; needs slimrank[onnx] or slimrank[openvino]; "
            "'remote-code': a copy with a small modelling file, which transformers runs with "
            "trust_remote_code."
        ),
    ] = "dense",
    json: opt.Json = False,
) -> None:
    """Write a compressed DIR in a form that needs no slimrank, as OUT."""
    report = export(folder, out, to)
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    typer.echo(report.line())
    typer.echo(f"wrote {out}")
