"""Models take turns: each in a process of its own, one at work at a time."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from slimrank.benchmarking.process import Worker
from slimrank.benchmarking.report import BenchmarkReport, CaseFigures, ModelFigures
from slimrank.errors import ModelError, RecipeError

Track = Callable[[Iterable[int], str], Iterable[int]]


def benchmark(
    model: str | Path,
    *,
    against: Sequence[str | Path] = (),
    batches: Sequence[int] = (1, 8, 32),
    contexts: Sequence[int] = (128, 512),
    new_tokens: int = 16,
    rounds: int = 3,
    threads: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    compiled: bool = False,
    track: Track = lambda steps, _what: steps,
) -> BenchmarkReport:
    """Measure prefill, decode and memory of a model, and of others beside it.

    Each model is in a process of its own, so that its memory is its own; they are all loaded at
    once. In every round they take turns, so that what else the machine does meets them alike.

    Parameters
    ----------
    model : str or Path
        Dense or compressed: folder, hub id or .gguf file.
    against : sequence of str or Path
        What it is held against.
    batches, contexts : sequence of int
        Sequences at once, and tokens of each. Every pair is measured, from small to large.
    new_tokens : int
        Decoded in each round.
    rounds : int
        What medians are taken of; a short one before them does not count.
    threads : int, optional
        Of a CPU, to which the processes are held; all that may be used if left out.
    dtype : str
        To load in; 'auto' is each model's own.
    device : str, optional
        The CPU if left out.
    compiled : bool
        By ``torch.compile``, with weights packed for each shape, products of the steps chosen by
        their time, and a cache of fixed length: all models alike. Compiling takes minutes for each
        case and is not counted. Folders that cache latents get an ordinary cache.
    track : callable
        Wraps the loop over rounds, given a description, to show progress.

    Returns
    -------
    BenchmarkReport

    Raises
    ------
    RecipeError
        If a number is below one, or more threads are asked for than there are.
    ModelError
        If a model cannot be loaded or run, or is not made for so many tokens.
    ProcessError
        If the process of a model ends, as it does where memory is short.
    """
    models = [str(name) for name in (model, *against)]
    count = _threads(threads)
    cases = _cases(batches, contexts)
    _require_positive(new_tokens=new_tokens, rounds=rounds)
    how = {"dtype": dtype, "device": device, "compiled": compiled}
    with ExitStack() as stack:
        workers = [Worker(name, count, device) for name in models]
        for worker in workers:
            stack.callback(worker.end)
        loaded = [worker.ask("load", model=worker.name, threads=count, **how) for worker in workers]
        for worker, about in zip(workers, loaded, strict=True):
            _require_room(worker.name, about["longest"], max(contexts) + new_tokens)
        steps = track(range(len(cases) * rounds), "benchmark")
        found = _measure(workers, cases, rounds, new_tokens, iter(steps))
    return BenchmarkReport(
        environment=loaded[0]["environment"],
        compiled=compiled,
        rounds=rounds,
        new_tokens=new_tokens,
        models=tuple(
            ModelFigures(
                name=name,
                dtype=about["environment"]["dtype"],
                weight_bytes=about["weight_bytes"],
                before_bytes=about["before_bytes"],
                cases=tuple(figures),
            )
            for name, about, figures in zip(models, loaded, found, strict=True)
        ),
    )


def _measure(
    workers: Sequence[Worker],
    cases: Sequence[tuple[int, int]],
    rounds: int,
    new_tokens: int,
    steps: Iterator[int],
) -> list[list[CaseFigures]]:
    """Figures of each worker in each case."""
    found: list[list[CaseFigures]] = [[] for _ in workers]
    for batch, context in cases:
        for worker in workers:
            worker.ask("warm_up", batch=batch, context=context, new_tokens=new_tokens)
        answers: list[list[dict[str, Any]]] = [[] for _ in workers]
        for _ in range(rounds):
            for worker, mine in zip(workers, answers, strict=True):
                mine.append(worker.ask("run", batch=batch, context=context, new_tokens=new_tokens))
            next(steps, None)
        for figures, mine in zip(found, answers, strict=True):
            figures.append(_figures(batch, context, mine))
    for _ in steps:  # lets the progress bar see its end
        pass
    return found


def _figures(batch: int, context: int, answers: Sequence[dict[str, Any]]) -> CaseFigures:
    return CaseFigures(
        batch=batch,
        context=context,
        prefill_seconds=tuple(answer["prefill_seconds"] for answer in answers),
        decode_seconds=tuple(answer["decode_seconds"] for answer in answers),
        cache_bytes=answers[-1]["cache_bytes"],
        peak_bytes=answers[-1]["peak_bytes"],
    )


def _cases(batches: Sequence[int], contexts: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs, the one with the fewest tokens first."""
    if not batches or not contexts:
        raise RecipeError("there is nothing to measure: give at least one batch and one context")
    _require_positive(batch=min(batches), context=min(contexts))
    pairs = set(product(batches, contexts))
    return sorted(pairs, key=lambda case: (case[0] * case[1], case))


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise RecipeError(f"{name.replace('_', ' ')} is {number}; it is at least 1")


def _require_room(name: str, longest: int | None, tokens: int) -> None:
    if longest is not None and tokens > longest:
        raise ModelError(f"{name} is made for {longest} tokens, and {tokens} are asked for")


def _threads(wanted: int | None) -> int:
    """How many are wanted, of those that this process may use."""
    may = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted is None:
        return may
    if not 1 <= wanted <= may:
        raise RecipeError(f"threads is {wanted}; there are {may}")
    return wanted
