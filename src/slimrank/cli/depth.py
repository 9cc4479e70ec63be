"""``slimrank depth``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table
from slimrank.depth_plot import HELD_OUT, DepthReport, DepthRun, read_depths, write_depth_plot
from slimrank.report import BlockError

RUNS_ACROSS = 5  # of a table


@friendly
def depth_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Folders that slimrank compress wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture to write, a .png; must not exist."),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Say how the error of each FOLDER grows from block to block.

    Takes runs with --order sequential. The picture needs slimrank[analysis].
    """
    report = read_depths(folders)
    if out is not None:
        write_depth_plot(report, out)
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    for first in range(0, len(report.runs), RUNS_ACROSS):
        _print_runs(report.runs[first : first + RUNS_ACROSS], first + 1)
    _print_differences(report)
    if out is not None:
        typer.echo(f"wrote {out}")


def _print_runs(runs: Sequence[DepthRun], first: int) -> None:
    """Print one row a block; runs go by number, from `first` on."""
    numbered = dict(enumerate(runs, first))
    curves: dict[int, Mapping[int, BlockError]] = {}
    title = ["relative error and cosine distance of the blocks' outputs"]
    for number, run in numbered.items():
        text, curves[number] = next(iter(run.curves().items()))
        only = "" if text == HELD_OUT else ", as none was held out"
        title.append(f"  {number}: {run.label}, on {text}{only}")
    columns = ["block"]
    for number in numbered:
        columns += [f"error {number}", f"cosine {number}"]
    blocks = sorted({block.index for run in runs for block in run.blocks})
    rows = [
        (block, *(figure for curve in curves.values() for figure in _figures(curve.get(block))))
        for block in blocks
    ]
    print_table("\n".join(title), columns, rows)


def _figures(error: BlockError | None) -> tuple[str, str]:
    if error is None:
        return "-", "-"
    return f"{error.relative_error:.3g}", f"{error.cosine_distance:.3g}"


def _print_differences(report: DepthReport) -> None:
    """Say what else the runs differ in that their errors may come from."""
    models = dict.fromkeys(run.model for run in report.runs)
    if len(models) > 1:
        typer.echo(f"the runs are of different models: {', '.join(models)}")
    if len({run.calibration_fingerprint for run in report.runs}) > 1:
        typer.echo("the runs were calibrated on different text")
