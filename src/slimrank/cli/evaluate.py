"""``slimrank evaluate``."""

from typing import Annotated

import typer

from slimrank.calibration import read_text
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, track
from slimrank.evaluation import perplexity
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize


@friendly
def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Dense or compressed: folder, hub id or .gguf file."),
    ],
    text: Annotated[list[str], typer.Option(help="Text file; may be given more than once.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    num_windows: Annotated[
        int | None, typer.Option(help="Only the first windows. [default: all the text]")
    ] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text. Nothing is skipped."""
    words = read_text(CalibrationRecipe(source=tuple(text)))
    source = parse_source(model)
    ids = tokenize(load_tokenizer(source), words)
    loaded = load_model(source, dtype or "auto")
    result = perplexity(
        loaded.to(device) if device else loaded,
        ids,
        sequence_length,
        num_windows,
        track=lambda windows, total: track(windows, "evaluating", total),
    )
    if json:
        print_json(result.model_dump_json(indent=1))
        return
    typer.echo(
        f"perplexity {result.value:.4f} ± {result.stderr:.4f} over {result.tokens} tokens in "
        f"{result.windows} windows of {result.sequence_length}; none skipped"
    )
