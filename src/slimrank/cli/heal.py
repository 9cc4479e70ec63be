"""``slimrank heal``."""

from pathlib import Path
from typing import Annotated

import typer

from slimrank.checkpoint import UNFINISHED_HEALING
from slimrank.cli import options as opt
from slimrank.cli.output import (
    friendly,
    print_json,
    print_table,
    say_if_it_begins,
    says_what_is_kept,
    track,
)
from slimrank.healing import heal
from slimrank.recipe import HEAL_RATE, LORA_RATE, HealRecipe
from slimrank.report import HealReport

GO_ON = "what was trained is kept; go on: slimrank heal … --resume"


@friendly
def heal_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that slimrank wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, folder or hub data set to train on; may be given more than once."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model: a folder, a hub id, or a .gguf file. [default: the one that DIR "
            "was made from]",
        ),
    ] = None,
    num_sequences: Annotated[
        int | None, typer.Option(help="Sequences to train on. [default: all that the text has]")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in each. [default: 512]")
    ] = None,
    held_out_sequences: Annotated[
        int | None,
        typer.Option(
            help="Further sequences of the text, to stop by and not to train on. [default: 16]"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the sequences. [default: 1]")
    ] = None,
    batch_sequences: Annotated[
        int | None, typer.Option(help="Sequences of one step. [default: 8]")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Of AdamW, at its peak. [default: {HEAL_RATE:g}, with --lora {LORA_RATE:g}]"
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Train adapters of this rank on the factors, and merge them at the end; needs "
            "slimrank[heal]. [default: train factors and norms]",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many looks at the held-out sequences, of 16, without a better one. "
            "[default: 4]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draw and the order of sequences. [default: 0]")
    ] = None,
    device: opt.Device = None,
    batch_size: opt.BatchSize = None,
    resume: opt.Resume = False,
    json: opt.Json = False,
) -> None:
    """Train a compressed DIR towards the dense model's predictions, as OUT.

    All blocks together, on text that is held against the dense model as it goes. OUT has the size
    of DIR, and is never worse than it on the held-out sequences.
    """
    given = {
        "source": text or None,
        "num_sequences": num_sequences,
        "sequence_length": sequence_length,
        "held_out_sequences": held_out_sequences,
        "epochs": epochs,
        "batch_sequences": batch_sequences,
        "learning_rate": learning_rate,
        "lora_rank": lora,
        "patience": patience,
        "seed": seed,
    }
    values = {key: value for key, value in given.items() if value is not None}
    recipe = HealRecipe.from_dict(values, "heal")
    say_if_it_begins(resume, UNFINISHED_HEALING.is_kept(out) or out.exists())
    with says_what_is_kept(lambda: GO_ON if UNFINISHED_HEALING.is_kept(out) else None):
        report = heal(
            folder,
            out,
            recipe,
            teacher=teacher,
            device=device,
            batch_size=batch_size,
            resume=resume,
            track=track,
        )
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    print_healing(report)
    typer.echo(f"written to {out}, read back and compared")


def print_healing(report: HealReport) -> None:
    """Print the curve on held-out text, and what it came to."""
    rows = [
        (
            check.step,
            check.tokens,
            f"{check.divergence:.4f}",
            f"{check.perplexity:.3f}",
            f"{check.seconds:.1f}",
            "kept" if check.step == report.kept_step else "",
        )
        for check in report.checks
    ]
    columns = ("step", "tokens", "nats a token", "perplexity", "seconds", "")
    print_table(f"healed on held-out text, beside {report.teacher}", columns, rows)
    typer.echo(report.line())
