"""What was measured: frozen, written as ``frontier.json``."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class TextFigure(_Frozen):
    """Perplexity on a text; `in_domain` if it is of the kind that was calibrated on."""

    value: float
    tokens: int
    in_domain: bool


class TaskFigure(_Frozen):
    """Share of `n` questions that were answered rightly, and its standard error."""

    value: float
    stderr: float
    n: int


class FrontierRun(_Frozen):
    """One model under the accounting that all have in common.

    Parameters
    ----------
    name : str
    recipe : dict
        All settings; those that were given, where they are no valid recipe; empty for a baseline.
    keep : float
        Share of the parameters that was to stay.
    layout, method, allocation, refine : str
        As in the recipe; 'dense', or 'dense' and 'int8', for a baseline.
    bytes : int
        Of the weight files of the model, to the byte.
    linear_bytes : int
        Of the targeted linears in them, biases left out.
    params, target_params : int
        Of the model, and of its targeted linears.
    perplexity : dict of str to TextFigure
    accuracy : dict of str to TaskFigure
        Not normalised by length.
    seconds : float
        To make the model: the profile that it was made from is counted in, measuring is not.
    peak_bytes : int
        Largest resident memory meanwhile, the dense model of the benchmark counted in.
    is_dense : bool
        A baseline without factors.
    int8_factors : bool
        Its factors were rounded to int8 in the end.
    pareto : bool
        No other is as small and better, or smaller and as good, on the first text.
    error : str or None
        Why there are no figures.
    """

    name: str
    recipe: dict[str, Any]
    keep: float
    layout: str
    method: str
    allocation: str
    refine: str
    bytes: int = 0
    linear_bytes: int = 0
    params: int = 0
    target_params: int = 0
    perplexity: dict[str, TextFigure] = {}
    accuracy: dict[str, TaskFigure] = {}
    seconds: float = 0.0
    peak_bytes: int = 0
    is_dense: bool = False
    int8_factors: bool = False
    pareto: bool = False
    error: str | None = None


class FrontierReport(_Frozen):
    """All runs on one model, in the order of the benchmark.

    Parameters
    ----------
    version : 1
        ``schema`` in the file.
    model : str
    environment : dict of str to str
        Versions, platform, device, threads.
    date : str
        When it was written, in UTC.
    settings : dict
        Texts, windows, questions and seed.
    runs : tuple of FrontierRun
        Those that are finished, and those that failed.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    model: str
    environment: dict[str, str]
    date: str
    settings: dict[str, Any]
    runs: tuple[FrontierRun, ...]

    def to_json(self) -> str:
        """Write it as the file has it."""
        return self.model_dump_json(by_alias=True, indent=1)

    @property
    def texts(self) -> list[str]:
        """Texts that were measured on; the front is drawn by the first."""
        return list(self.settings["texts"])


def with_front(runs: Sequence[FrontierRun], text: str) -> tuple[FrontierRun, ...]:
    """Mark the Pareto front of bytes and perplexity on a text; runs with an error are not on it.

    Examples
    --------
    >>> points = (("a", 1, 9.0), ("b", 2, 5.0), ("c", 3, 6.0), ("d", 2, 7.0), ("e", 2, 5.0))
    >>> def on(value):
    ...     return {"t": TextFigure(value=value, tokens=1, in_domain=False)}
    >>> common = dict(recipe={}, keep=1, layout="", method="", allocation="", refine="")
    >>> runs = [FrontierRun(name=n, bytes=b, perplexity=on(p), **common) for n, b, p in points]
    >>> [run.name for run in with_front(runs, "t") if run.pareto]
    ['a', 'b', 'e']
    """
    points = [(r.bytes, r.perplexity[text].value) for r in runs if r.error is None]

    def is_beaten(size: int, value: float) -> bool:
        return any(s <= size and v <= value and (s, v) != (size, value) for s, v in points)

    return tuple(
        run.model_copy(
            update={
                "pareto": run.error is None and not is_beaten(run.bytes, run.perplexity[text].value)
            }
        )
        for run in runs
    )
