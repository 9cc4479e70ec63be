"""What a benchmark of many runs wrote: `frontier.json`, read and checked."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slimrank.errors import CheckpointError
from slimrank.report import Count


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TextPerplexity(_Frozen):
    """Perplexity on one text; `in_domain` says that it is of the kind that was calibrated on."""

    value: float
    tokens: Count = 0
    in_domain: bool = False

    @field_validator("value", mode="before")
    @classmethod
    def _null_is_no_number(cls, value: Any) -> Any:
        return math.nan if value is None else value

    @field_validator("value")
    @classmethod
    def _is_above_zero(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("a perplexity is above 0")
        return value


class TaskAccuracy(_Frozen):
    """Share of `n` questions that were answered rightly, and its standard error."""

    value: float
    stderr: float
    n: Count


class FrontierRun(_Frozen):
    """One model: dense, quantised, or compressed by one recipe.

    Parameters
    ----------
    name, method, allocation, layout, refine : str
    recipe : dict
    keep : float
        Share of the targeted parameters that was to stay.
    bytes, linear_bytes : int
        Of the whole model as stored, and of its targeted linears.
    params, target_params : int
    perplexity : dict of str to TextPerplexity
    accuracy : dict of str to TaskAccuracy
    seconds : float
    peak_bytes : int
    is_dense : bool
        A baseline, full rank: the dense model, or a quantised one.
    int8_factors : bool
        Its factors are in int8; others of the same `keep` are larger.
    pareto : bool
    error : str or None
        Why there are no figures.
    """

    name: str
    recipe: dict[str, Any] = {}
    keep: float = 1.0
    layout: str = ""
    method: str = ""
    allocation: str = ""
    refine: str = ""
    bytes: Count = 0
    linear_bytes: Count = 0
    params: Count = 0
    target_params: Count = 0
    perplexity: dict[str, TextPerplexity] = {}
    accuracy: dict[str, TaskAccuracy] = {}
    seconds: float = 0.0
    peak_bytes: Count = 0
    is_dense: bool = False
    int8_factors: bool = False
    pareto: bool = False
    error: str | None = None

    def on(self, text: str) -> float:
        """Perplexity on a text; not a number if it was not measured."""
        return self.perplexity[text].value if text in self.perplexity else math.nan

    @property
    def size(self) -> str:
        """What runs of about as many bytes have in common.

        Examples
        --------
        >>> FrontierRun(name="a", keep=0.8, int8_factors=True).size
        '0.8 in int8'
        """
        return f"{self.keep:g} in int8" if self.int8_factors else f"{self.keep:g}"


class FrontierReport(_Frozen):
    """All runs of a benchmark on one model. Keys that are not named here are passed over."""

    version: Literal[1] = Field(alias="schema")
    model: str
    environment: dict[str, Any] = {}
    date: str = ""
    settings: dict[str, Any] = {}
    runs: tuple[FrontierRun, ...]

    @classmethod
    def from_json(cls, text: str, where: str) -> "FrontierReport":
        """Read what a benchmark wrote.

        Raises
        ------
        CheckpointError
            If it is no such report, or one of another version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{where} is no frontier: {key}: {first['msg']}") from error

    def texts(self) -> list[str]:
        """Texts that were measured on, those of other domains than the calibration text first."""
        known = {text: p.in_domain for run in self.runs for text, p in run.perplexity.items()}
        return sorted(known, key=lambda text: known[text])

    def tasks(self) -> list[str]:
        """Tasks that accuracies are of."""
        runs = [run for run in self.runs if run.error is None]
        return list(dict.fromkeys(task for run in runs for task in run.accuracy))

    def is_in_domain(self, text: str) -> bool:
        """Whether a text is of the kind that was calibrated on."""
        return any(run.perplexity[text].in_domain for run in self.runs if text in run.perplexity)

    def dense(self) -> FrontierRun | None:
        """The model that was compressed: the largest of the baselines."""
        baselines = [run for run in self.runs if run.is_dense and run.error is None]
        return max(baselines, key=lambda run: run.bytes, default=None)


def by_size(runs: Iterable[FrontierRun]) -> dict[str, list[FrontierRun]]:
    """Give the compressed runs among some at each size, large sizes first.

    Examples
    --------
    >>> sizes = (("a", 0.6, False), ("b", 0.8, True), ("c", 0.8, False), ("d", 0.6, False))
    >>> runs = [FrontierRun(name=n, keep=k, int8_factors=i) for n, k, i in sizes]
    >>> {size: [run.name for run in own] for size, own in by_size(runs).items()}
    {'0.8': ['c'], '0.8 in int8': ['b'], '0.6': ['a', 'd']}
    """
    groups: dict[str, list[FrontierRun]] = {}
    for run in sorted(runs, key=lambda run: (-run.keep, run.int8_factors)):
        if not run.is_dense:
            groups.setdefault(run.size, []).append(run)
    return groups


def front(runs: Sequence[FrontierRun], figure: Callable[[FrontierRun], float]) -> list[FrontierRun]:
    """Runs for which no other one is as small and better, or smaller and as good; small ones first.

    Examples
    --------
    >>> runs = [FrontierRun(name=n, bytes=b, seconds=s) for n, b, s in
    ...     (("a", 1, 9.0), ("b", 2, 5.0), ("c", 3, 6.0), ("d", 2, 7.0))]
    >>> [run.name for run in front(runs, lambda run: run.seconds)]
    ['a', 'b']
    """
    best, kept = math.inf, []
    for run in sorted(runs, key=lambda run: (run.bytes, figure(run))):
        if figure(run) < best:
            best = figure(run)
            kept.append(run)
    return kept
