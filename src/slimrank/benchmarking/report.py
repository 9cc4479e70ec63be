"""What was measured: frozen, printed as JSON."""

from collections.abc import Iterator
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class CaseFigures(_Frozen):
    """One model on so many sequences of so many tokens.

    Parameters
    ----------
    batch : int
        Sequences at once.
    context : int
        Tokens of each in front of the first new one.
    prefill_seconds : tuple of float
        In each round, for all tokens of all sequences, and the first new token of each.
    decode_seconds : tuple of float
        In each round, the median of a step: one new token of each sequence.
    cache_bytes : int
        Of keys and values, or of their latents, after the context.
    peak_bytes : int
        Largest memory of the model's process so far: resident, or on the accelerator. Cases are run
        from small to large.
    """

    batch: int
    context: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    cache_bytes: int
    peak_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def prefill_rate(self) -> float:
        """Tokens of the context in a second, in the median round."""
        return self.batch * self.context / median(self.prefill_seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def decode_rate(self) -> float:
        """New tokens in a second, of all sequences together, in the median round."""
        return self.batch / median(self.decode_seconds)


class ModelFigures(_Frozen):
    """One model in all cases.

    Parameters
    ----------
    name : str
        As it was given.
    dtype : str
        Of its parameters.
    weight_bytes : int
        Of its parameters and buffers in memory.
    before_bytes : int
        Of the same memory before the model was loaded: resident, Python, torch and transformers.
    cases : tuple of CaseFigures
    """

    name: str
    dtype: str
    weight_bytes: int
    before_bytes: int
    cases: tuple[CaseFigures, ...]


class BenchmarkReport(_Frozen):
    """Models side by side.

    Parameters
    ----------
    version : 1
        ``schema`` in the file.
    environment : dict of str to str
        Versions, platform, device, threads; dtype is that of the first model.
    compiled : bool
        By ``torch.compile``, all of them.
    rounds : int
        What figures are medians of; the models take turns within each.
    new_tokens : int
        Decoded in each round.
    models : tuple of ModelFigures
        The one that is asked about first, then those that it is held against.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    environment: dict[str, str]
    compiled: bool
    rounds: int
    new_tokens: int
    models: tuple[ModelFigures, ...]

    def rows(self) -> Iterator[tuple[CaseFigures, ModelFigures, float | None, float | None]]:
        """Every case of every model, and how many times as fast the first one is in it.

        Yields
        ------
        case : CaseFigures
        model : ModelFigures
        prefill, decode : float or None
            Rates of the first model over those of this one; None for itself.
        """
        first, *others = self.models
        for number, case in enumerate(first.cases):
            yield case, first, None, None
            for other in others:
                same = other.cases[number]
                yield (
                    same,
                    other,
                    case.prefill_rate / same.prefill_rate,
                    case.decode_rate / same.decode_rate,
                )

    def to_json(self) -> str:
        """Write it, with medians beside the seconds of all rounds."""
        return self.model_dump_json(by_alias=True, indent=1)
