"""``slimrank quantize``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.calibration import read_text
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table, role
from slimrank.quantizing import quantize
from slimrank.recipe import CalibrationRecipe
from slimrank.report import QuantizationReport
from slimrank.source import load_tokenizer, parse_source, tokenize


@friendly
def quantize_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that slimrank wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight; only 8.")] = 8,
    packing: Annotated[
        str,
        typer.Option(
            help="How factors are stored: codes with a scale for each row ('rows'), or both in the "
            "memory of one dense matrix, partly in 16 bits ('remapped', the q rows of AA-SVD)."
        ),
    ] = "rows",
    dense_linears: Annotated[
        bool,
        typer.Option(
            "--dense-linears", help="Round the linears of the blocks that stayed dense too."
        ),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file to take the perplexity on, before and after; may be given more than "
            "once."
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window of it.")] = 2048,
    json: opt.Json = False,
) -> None:
    """Round the factors of a compressed DIR to 8 bits, as OUT; needs no calibration.

    What is stored are int8 codes and their scales; activations stay floats.
    """
    ids = None
    if text:
        words = read_text(CalibrationRecipe(source=tuple(text)))
        ids = tokenize(load_tokenizer(parse_source(folder)), words)
    report = quantize(
        folder,
        out,
        bits=bits,
        packing=packing,
        dense_linears=dense_linears,
        text=ids,
        sequence_length=sequence_length,
    )
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    print_rounding(report)
    typer.echo(f"wrote {out}")


def print_rounding(report: QuantizationReport) -> None:
    """Print what the rounding cost, by role, beside what the rank had cost."""
    by_role: dict[str, list[tuple[float, float | None]]] = {}
    for linear in report.linears:
        losses = linear.rounding_loss, linear.truncation_loss
        by_role.setdefault(role(linear.name), []).append(losses)
    rows = []
    for name, pairs in by_role.items():
        rounding = [pair[0] for pair in pairs]
        known = [pair[1] for pair in pairs if pair[1] is not None]
        truncation = f"{sum(known) / len(known):.3%}" if known else "-"
        rows.append((name, len(pairs), f"{sum(rounding) / len(rounding):.4%}", truncation))
    columns = ("linear", "count", "lost by rounding", "lost by the rank")
    print_table(f"linears in {report.stored_as()}", columns, rows)
    typer.echo(report.line())
