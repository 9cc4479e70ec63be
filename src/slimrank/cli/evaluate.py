"""``slimrank evaluate``."""

import json as json_text
from pathlib import Path
from typing import Annotated, Any

import typer

from slimrank.calibration import read_text
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table, track
from slimrank.errors import RecipeError
from slimrank.evaluation import (
    ChoiceResult,
    ChoiceTask,
    EvalResult,
    find_choice_tasks,
    mean_accuracy,
    perplexity,
    read_choice_tasks,
    require_harness,
    zero_shot,
)
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_tokenizer, open_model, parse_source, tokenize


@friendly
def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Dense or compressed: folder, hub id or .gguf file."),
    ],
    text: Annotated[
        list[str] | None, typer.Option(help="Text file; may be given more than once.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    num_windows: Annotated[
        int | None, typer.Option(help="Only the first windows. [default: all the text]")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--zero-shot",
            metavar="FOLDER",
            help="Ask the questions in FOLDER/<task>.jsonl, one a line, offline; needs "
            "slimrank[eval].",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Names of tasks, with commas between. [default: all in FOLDER]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first questions of each. [default: all]", min=2)
    ] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    stream: opt.Stream = False,
    json: opt.Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text, and its accuracy on questions. Nothing is skipped.

    One of --text and --zero-shot is needed; both may be given.
    """
    if not text and folder is None:
        raise RecipeError("nothing to evaluate on: give --text, --zero-shot or both")
    if folder is None and (tasks is not None or limit is not None):
        raise RecipeError("--tasks and --limit are for --zero-shot FOLDER")
    questions = _read_questions(folder, tasks, limit) if folder else []
    words = read_text(CalibrationRecipe(source=tuple(text))) if text else ""
    source = parse_source(model)
    tokenizer = load_tokenizer(source)
    ids = tokenize(tokenizer, words) if text else None
    loaded = open_model(source, dtype or "auto", device=device, stream=stream)
    result = None
    if ids is not None:
        result = perplexity(
            loaded,
            ids,
            sequence_length,
            num_windows,
            track=lambda windows, total: track(windows, "evaluating", total),
        )
    _print(result, _ask(loaded, tokenizer, questions), as_json=json)


def _read_questions(folder: Path, tasks: str | None, limit: int | None) -> list[ChoiceTask]:
    """Read the questions, before any work, once the harness is seen to be there."""
    require_harness()
    names = find_choice_tasks(folder) if tasks is None else [t.strip() for t in tasks.split(",")]
    return read_choice_tasks(folder, names, limit)


def _ask(model: Any, tokenizer: Any, tasks: list[ChoiceTask]) -> dict[str, ChoiceResult]:
    """Ask task after task; the harness shows its own progress."""
    found: dict[str, ChoiceResult] = {}
    for number, task in enumerate(tasks, start=1):
        typer.echo(f"{task.name} ({number} of {len(tasks)}): {len(task.rows)} questions", err=True)
        found |= zero_shot(model, tokenizer, [task])
    return found


def _print(result: EvalResult | None, accuracy: dict[str, ChoiceResult], as_json: bool) -> None:
    """Print figures: those of perplexity as they are alone, those of questions beside them."""
    mean, stderr = mean_accuracy(list(accuracy.values())) if accuracy else (0.0, 0.0)
    if as_json:
        values: dict[str, Any] = result.model_dump() if result else {}
        if accuracy:
            found = {name: task.model_dump() for name, task in accuracy.items()}
            values["zero_shot"] = {"tasks": found, "mean": mean, "stderr": stderr}
        print_json(json_text.dumps(values, indent=1))
        return
    if result:
        typer.echo(
            f"perplexity {result.value:.4f} ± {result.stderr:.4f} over {result.tokens} tokens in "
            f"{result.windows} windows of {result.sequence_length}; none skipped"
        )
    if accuracy:
        rows = [(t.task, t.num_questions, _share(t.accuracy, t.stderr)) for t in accuracy.values()]
        questions = sum(task.num_questions for task in accuracy.values())
        rows.append(("mean of tasks", questions, _share(mean, stderr)))
        print_table("zero-shot accuracy, %", ["task", "questions", "accuracy"], rows)


def _share(value: float, stderr: float) -> str:
    return f"{100 * value:.1f} ± {100 * stderr:.1f}"
