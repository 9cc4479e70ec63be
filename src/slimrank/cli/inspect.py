"""``slimrank inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.checkpoint import read_folder
from slimrank.cli import options as opt
from slimrank.cli.compress import print_allocation, print_losses
from slimrank.cli.heal import print_healing
from slimrank.cli.output import friendly, print_json, print_size, print_table, role, span
from slimrank.cli.quantize import print_rounding


@friendly
def inspect_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that slimrank wrote.")],
    json: opt.Json = False,
) -> None:
    """Say what a compressed FOLDER holds: ranks, sizes, recipe, losses. Reads no weight."""
    contents = read_folder(folder)
    if json:
        print_json(contents.model_dump_json(indent=1))
        return
    by_role: dict[str, list[int]] = {}
    for name, rank in contents.ranks.items():
        by_role.setdefault(role(name), []).append(rank)
    rows = [(name, len(ranks), span(ranks)) for name, ranks in by_role.items()]
    print_table(f"factorised linears of {folder}", ("linear", "count", "rank"), rows)
    report = contents.report
    if report is None:
        typer.echo("no report.json: sizes are of the factorised linears, from the files")
    elif not contents.report_fits:
        typer.echo("report.json describes other weights than these; sizes are from the files")
    else:
        print_losses(report)
        print_allocation(report)
        typer.echo(
            f"from {report.model} by {report.recipe.method}, {report.tokens} tokens, "
            f"calibration {report.calibration_fingerprint[:12] or 'none'}, "
            f"recipe {report.recipe_fingerprint[:12]}"
        )
        typer.echo(report.recipe.to_yaml().rstrip())
    if contents.healing is not None:
        print_healing(contents.healing)
    if contents.quantization is not None:
        print_rounding(contents.quantization)
    print_size(contents.size)
    if report is not None and report.kv_cache:
        typer.echo(report.kv_cache.line())
