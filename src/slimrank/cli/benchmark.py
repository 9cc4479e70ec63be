"""``slimrank benchmark``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.benchmarking import BenchmarkReport, benchmark
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table, track
from slimrank.errors import RecipeError

COLUMNS = ("model", "batch", "context", "prefill", "decode", "cache MB", "peak MB", "faster")


@friendly
def benchmark_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Dense or compressed: folder, hub id or .gguf file."),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another to hold it against; may be given repeatedly."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Sequences at once, with commas between.")] = (
        "1,8,32"
    ),
    contexts: Annotated[str, typer.Option(help="Tokens of each, with commas between.")] = "128,512",
    new_tokens: Annotated[int, typer.Option(help="Decoded in each round.")] = 16,
    rounds: Annotated[int, typer.Option(help="What medians are taken of.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. [default: all]")] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="By torch.compile, minutes for each case: packed weights, cache of fixed length.",
        ),
    ] = False,
    json: opt.Json = False,
) -> None:
    """Measure how fast MODEL reads and writes, and what memory it takes.

    Prefill and decode are in tokens a second, over all sequences. Models take turns in every round,
    each in a process of its own, all of them loaded at once.
    """
    report = benchmark(
        model,
        against=against or (),
        batches=_numbers("batches", batches),
        contexts=_numbers("contexts", contexts),
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        dtype=dtype or "auto",
        device=device,
        compiled=compiled,
        track=track,
    )
    if json:
        print_json(report.to_json())
        return
    _print(report)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--{name} is '{text}'; give whole numbers with commas between") from None


def _short(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _print(report: BenchmarkReport) -> None:
    where = report.environment
    how = ", compiled" if report.compiled else ""
    title = (
        f"tokens a second{how}, medians of {report.rounds} rounds, {where['device']}, "
        f"{where['threads']} threads"
    )
    rows = [
        (
            f"{_short(model.name)} ({model.dtype})",
            case.batch,
            case.context,
            f"{case.prefill_rate:.1f}",
            f"{case.decode_rate:.1f}",
            f"{case.cache_bytes / 1e6:.1f}",
            f"{case.peak_bytes / 1e6:.0f}",
            "" if prefill is None else f"{prefill:.2f}x, {decode:.2f}x",
        )
        for case, model, prefill, decode in report.rows()
    ]
    print_table(title, COLUMNS, rows)
    for model in report.models:
        typer.echo(
            f"{_short(model.name)}: weights {model.weight_bytes / 1e6:.1f} MB in memory; "
            f"{model.before_bytes / 1e6:.0f} MB of the peak were there before"
        )
    if len(report.models) > 1:
        typer.echo(f"faster: {_short(report.models[0].name)} over this one, prefill and decode")
