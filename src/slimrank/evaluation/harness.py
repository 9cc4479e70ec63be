"""Zero-shot accuracy by lm-evaluation-harness, offline, on local files of questions."""

import copy
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from slimrank.errors import NumericalError, SlimrankWarning, TextError, extra_needed
from slimrank.evaluation.choice import ChoiceTask
from slimrank.evaluation.quiet import quiet

LOGGERS = ("lm_eval", "lm-eval", "datasets", "accelerate", "torchao", "torch.utils._pytree")
FORMS = {
    False: {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"},
    True: {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"},
}


class ChoiceResult(BaseModel):
    """Accuracy on one task.

    Parameters
    ----------
    task : str
    accuracy, stderr : float
        Share of questions whose right answer has the largest log-likelihood, and the standard error
        of that share.
    accuracy_norm, stderr_norm : float or None
        The same with each log-likelihood divided by the characters of its answer; None where the
        answers are in the contexts.
    num_questions : int
        All of the task: none is skipped.
    num_cut : int
        Answers that do not fit the model's context with their question, which lost its beginning.
    data_fingerprint : str
        SHA-256 of the questions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    accuracy: float
    stderr: float
    accuracy_norm: float | None
    stderr_norm: float | None
    num_questions: int
    num_cut: int
    data_fingerprint: str


def mean_accuracy(results: Sequence[ChoiceResult]) -> tuple[float, float]:
    """Mean of the accuracies of several tasks, each counting the same, and its standard error.

    Examples
    --------
    >>> rest = dict(accuracy_norm=None, stderr_norm=None, num_questions=9, num_cut=0)
    >>> some = dict(data_fingerprint="", **rest)
    >>> first = ChoiceResult(task="a", accuracy=0.5, stderr=0.03, **some)
    >>> mean_accuracy([first, ChoiceResult(task="b", accuracy=0.75, stderr=0.04, **some)])
    (0.625, 0.025)
    """
    count = len(results)
    mean = sum(result.accuracy for result in results) / count
    return mean, math.sqrt(sum(result.stderr**2 for result in results)) / count


def require_harness() -> None:
    """See that lm-evaluation-harness is installed, before any work.

    Raises
    ------
    SlimrankError
        If it is not.
    """
    with extra_needed("zero-shot accuracy needs lm-eval", "eval"), quiet(*LOGGERS):
        import lm_eval  # noqa: F401


def zero_shot(
    model: Any, tokenizer: Any, tasks: Sequence[ChoiceTask], batch_size: int = 16
) -> dict[str, ChoiceResult]:
    """Ask a model the questions of each task, without examples.

    Parameters
    ----------
    model : PreTrainedModel
        Dense or compressed; put into eval mode meanwhile.
    tokenizer : PreTrainedTokenizerBase
    tasks : sequence of ChoiceTask
    batch_size : int
        Answers at once.

    Returns
    -------
    dict of str to ChoiceResult

    Raises
    ------
    SlimrankError
        If lm-eval is not installed.
    NumericalError
        If a log-likelihood is not finite; nothing is skipped.
    TextError
        If lm-eval cannot score a question.
    """
    require_harness()
    was_training = model.training
    model.eval()
    try:
        with quiet(*LOGGERS), tempfile.TemporaryDirectory(prefix="slimrank-tasks-") as folder:
            found, num_cut = _run(Path(folder), model, tokenizer, tasks, batch_size)
    except (AssertionError, KeyError, IndexError) as error:
        line = " ".join(str(error).split()) or "an answer may be longer than the model's context"
        raise TextError(f"lm-eval cannot score these questions: {line}") from error
    finally:
        model.train(was_training)
    for task in tasks:
        if num_cut[task.name]:
            warnings.warn(
                f"{num_cut[task.name]} answers of {task.name} do not fit the model's context; "
                "their questions lost the beginning",
                SlimrankWarning,
                stacklevel=2,
            )
    return {task.name: _result(task, found, num_cut[task.name]) for task in tasks}


def _run(
    folder: Path, model: Any, tokenizer: Any, tasks: Sequence[ChoiceTask], batch_size: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Have lm-eval score the tasks; count the answers that it cuts."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for task in tasks:
        _write_task(folder, task)
    lm = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # lm-eval settles its padding token
        backend="causal",
        batch_size=batch_size,
    )
    with _offline():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = manager.load([task.name for task in tasks])
        found = evaluate(lm, loaded, bootstrap_iters=1, log_samples=True)
    return found, {task.name: _count_cut(task, lm.tok_encode, lm.max_length) for task in tasks}


@contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` read local files without telling its makers, and without progress bars."""
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        if had_bars:
            datasets.enable_progress_bars()


def _write_task(folder: Path, task: ChoiceTask) -> None:
    """Write a task as lm-eval reads it: YAML, and its questions as JSON lines."""
    delimiter, rows = _delimited(task)
    questions = folder / f"{task.name}.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metrics = ("acc",) if task.is_partial else ("acc", "acc_norm")
    config = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(questions)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        **FORMS[task.is_partial],
        "target_delimiter": delimiter,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _delimited(task: ChoiceTask) -> tuple[str, list[dict[str, Any]]]:
    """Take a space in front of every choice for the delimiter, as lm-eval's own tasks have it.

    What is scored is the same; but the characters that `accuracy_norm` divides by are then those of
    the answers alone.
    """
    rows = list(task.rows)
    if task.is_partial or not all(c.startswith(" ") for row in rows for c in row["choices"]):
        return "", rows
    return " ", [{**row, "choices": [c[1:] for c in row["choices"]]} for row in rows]


def _count_cut(task: ChoiceTask, encode: Any, length: int) -> int:
    """Count the answers that lm-eval cuts; a text has no more tokens than bytes, or hardly."""
    long = [
        context + answer
        for pairs in task.pairs()
        for context, answer in pairs
        if len((context + answer).encode()) >= length
    ]
    return sum(len(encode(text)) > length + 1 for text in long)


def _result(task: ChoiceTask, found: Mapping[str, Any], num_cut: int) -> ChoiceResult:
    """Take the figures of one task, once all of its log-likelihoods are seen to be finite."""
    samples, figures = found["samples"][task.name], found["results"][task.name]
    if len(samples) != len(task.rows):
        raise NumericalError(f"{task.name}: {len(samples)} of {len(task.rows)} questions scored")
    for sample in samples:
        if not all(math.isfinite(likelihood) for likelihood, _ in sample["filtered_resps"]):
            raise NumericalError(
                f"{task.name}, question {sample['doc_id'] + 1}: a log-likelihood is not finite; "
                "the model or its dtype is broken, and no question is ever skipped"
            )
    return ChoiceResult(
        task=task.name,
        accuracy=figures["acc,none"],
        stderr=figures["acc_stderr,none"],
        accuracy_norm=figures.get("acc_norm,none"),
        stderr_norm=figures.get("acc_norm_stderr,none"),
        num_questions=len(samples),
        num_cut=num_cut,
        data_fingerprint=task.fingerprint(),
    )
