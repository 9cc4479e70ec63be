"""``slimrank bench frontier``."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table, says_what_is_kept, track
from slimrank.errors import CheckpointError, SlimrankError, SlimrankWarning
from slimrank.frontier import (
    BenchRecipe,
    FrontierReport,
    FrontierRun,
    measure_frontier,
    write_plot,
)
from slimrank.options import CompressionOptions

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@bench_app.callback()
def bench_command() -> None:
    """Measure many recipes on one model, under one accounting."""


@bench_app.command("frontier")
@friendly
def frontier_command(
    recipe: Annotated[Path, typer.Option(help="YAML: model, texts, recipes and sizes.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of results; what is finished there is kept."),
    ],
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if any row failed, not only if all did.")
    ] = False,
    device: opt.Device = None,
    batch_size: opt.BatchSize = None,
    json: opt.Json = False,
) -> None:
    """Make a model by every recipe at every size, and hold perplexity against bytes.

    May be cut off at any moment: the same command goes on with what is not finished. Writes
    DIR/frontier.json after each row, and DIR/frontier.svg with slimrank[analysis].
    """
    how = CompressionOptions(device=device, batch_size=batch_size, track=track)
    bench = BenchRecipe.from_file(recipe)
    with says_what_is_kept(lambda: "finished rows are kept; the same command goes on"):
        report = measure_frontier(
            bench, out, options=how, say=lambda line: typer.echo(line, err=True)
        )
    finished = [run for run in report.runs if run.error is None]
    drawn = _draw(report, out) if finished else ""
    if json:
        print_json(report.to_json())
    else:
        print_runs(report)
        typer.echo(f"wrote {out / 'frontier.json'}{drawn}")
    if not finished or (strict and len(finished) < len(report.runs)):
        raise typer.Exit(1)


def print_runs(report: FrontierReport) -> None:
    """One row a run; then why there are no figures for those that failed."""
    texts, settings = report.texts, report.settings["texts"]
    tasks = list(dict.fromkeys(task for run in report.runs for task in run.accuracy))
    titles = [f"{text} *" if settings[text]["in_domain"] else text for text in texts]
    note = "; * of the kind that was calibrated on" if any("*" in x for x in titles) else ""
    columns = ["run", "MB", "linears MB", *titles, *tasks, "seconds", "front"]
    rows = [_cells(run, texts, tasks) for run in report.runs if run.error is None]
    print_table(f"perplexity{' and accuracy' if tasks else ''}{note}", columns, rows)
    for run in report.runs:
        if run.error is not None:
            typer.echo(f"{run.name}: {run.error}")


def _cells(run: FrontierRun, texts: list[str], tasks: list[str]) -> list[str]:
    accuracies = [run.accuracy[task] for task in tasks]
    return [
        run.name,
        f"{run.bytes / 1e6:.2f}",
        f"{run.linear_bytes / 1e6:.2f}",
        *(f"{run.perplexity[text].value:.2f}" for text in texts),
        *(f"{100 * found.value:.1f} ± {100 * found.stderr:.1f}" for found in accuracies),
        f"{run.seconds:.1f}",
        "*" if run.pareto else "",
    ]


def _draw(report: FrontierReport, out: Path) -> str:
    """Write the picture, and say where; without matplotlib there is a warning and none."""
    try:
        return f" and {write_plot(report, out)}"
    except CheckpointError:
        raise
    except SlimrankError as error:
        warnings.warn(str(error), SlimrankWarning, stacklevel=2)
        return ""
