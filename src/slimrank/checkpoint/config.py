"""All that a loader needs to know, as it stands in ``config.json``."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimrank.errors import CheckpointError

QUANT_METHOD = "low_rank"
FORMAT_VERSION = 1
Entry = TypeVar("Entry", bound=BaseModel)


class LowRankLinearConfig(BaseModel):
    """One factorised linear."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(ge=1)
    pivoted: bool = False


class SplitConfig(BaseModel):
    """A fused projection taken apart: which of its rows make keys and which values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[tuple[int, int], ...] = Field(min_length=1)
    values: tuple[tuple[int, int], ...] = Field(min_length=1)


class LatentConfig(BaseModel):
    """An attention whose cache holds latents: the linears of its keys and of its values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: str
    values: str


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed checkpoint.

    It sits in the quantiser's place because that is where transformers lets a package swap modules
    before weights are loaded; nothing is quantised.

    Parameters
    ----------
    linears : mapping of str to LowRankLinearConfig or mapping
        The factorised linears by full module name; what is not listed is dense.
    splits : mapping of str to SplitConfig or mapping, optional
        Fused projections that were split, by full name.
    kv_cache : mapping of str to LatentConfig or mapping, optional
        Attentions whose cache holds latents, by full name.
    format_version : int
    quant_method : str
        Always ``'low_rank'``.

    Raises
    ------
    CheckpointError
        If a key is unknown, a rank is no positive whole number, or the version is newer than this
        package.

    Examples
    --------
    >>> LowRankConfig(linears={"model.layers.0.mlp.up_proj": {"rank": 4}}).to_dict()
    {'quant_method': 'low_rank', 'format_version': 1, 'linears': {'model.layers.0.mlp.up_proj': {'rank': 4, 'pivoted': False}}}
    """  # noqa: E501

    def __init__(
        self,
        linears: Mapping[str, Any] | None = None,
        splits: Mapping[str, Any] | None = None,
        kv_cache: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config has unknown keys: {', '.join(unknown)}")
        if quant_method != QUANT_METHOD:
            raise CheckpointError(f"quant_method is '{quant_method}', not '{QUANT_METHOD}'")
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {format_version}; this slimrank reads version "
                f"{FORMAT_VERSION}: upgrade slimrank"
            )
        if not isinstance(linears, Mapping):
            raise CheckpointError("quantization_config.linears is no mapping of names to ranks")
        self.quant_method = quant_method
        self.format_version = format_version
        self.linears = {
            name: _entry(LowRankLinearConfig, "linears", name, value)
            for name, value in linears.items()
        }
        for name, linear in self.linears.items():
            if linear.pivoted:
                raise CheckpointError(f"{name} is pivoted, a layout this version does not read")
        self.splits = {
            name: _entry(SplitConfig, "splits", name, value)
            for name, value in (splits or {}).items()
        }
        self.kv_cache = {
            name: _entry(LatentConfig, "kv_cache", name, value)
            for name, value in (kv_cache or {}).items()
        }
        for entry in self.kv_cache.values():
            for name in (entry.keys, entry.values):
                if name not in self.linears:
                    raise CheckpointError(
                        f"quantization_config.kv_cache names {name}, which is not factorised"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        values: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "linears": {name: linear.model_dump() for name, linear in self.linears.items()},
        }
        for key, entries in (("splits", self.splits), ("kv_cache", self.kv_cache)):
            if entries:
                values[key] = {name: e.model_dump(mode="json") for name, e in entries.items()}
        return values


def _entry(kind: type[Entry], part: str, name: str, value: Any) -> Entry:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"])])
        raise CheckpointError(f"quantization_config.{part}.{key}: {first['msg']}") from error
