"""All that a loader needs to know, as it stands in ``config.json``."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimrank.errors import CheckpointError

QUANT_METHOD = "low_rank"
FORMAT_VERSION = 1
INT8_VERSION = 2  # of folders with int8 codes: what reads version 1 must refuse them
REMAPPED_VERSION = 3  # of folders with packed factors
Entry = TypeVar("Entry", bound=BaseModel)


class RemappedConfig(BaseModel):
    """What it takes to unpack the factors of one linear: the file has only the longer side."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: Literal["bfloat16", "float16"]
    out_features: int = Field(ge=1, le=2**31)
    in_features: int = Field(ge=1, le=2**31)


class LowRankLinearConfig(BaseModel):
    """One factorised linear."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(ge=1)
    pivoted: bool = False
    bits: int | None = Field(None, ge=8, le=8)
    remapped: RemappedConfig | None = None

    @model_validator(mode="after")
    def _stored_in_one_way(self) -> "LowRankLinearConfig":
        if self.remapped is not None and (self.pivoted or self.bits is not None):
            raise ValueError("'remapped' stands beside neither 'bits' nor the pivoted layout")
        return self


class RoundedLinearConfig(BaseModel):
    """One dense linear whose matrix is stored in eight bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: int = Field(ge=8, le=8)


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
    before weights are loaded. Factors may be quantised on top; few are.

    Parameters
    ----------
    linears : mapping of str to LowRankLinearConfig or mapping
        The factorised linears by full module name; what is not listed is dense.
    splits : mapping of str to SplitConfig or mapping, optional
        Fused projections that were split, by full name.
    kv_cache : mapping of str to LatentConfig or mapping, optional
        Attentions whose cache holds latents, by full name.
    rounded : mapping of str to RoundedLinearConfig or mapping, optional
        Dense linears in eight bits, by full name.
    format_version : int
        Of the file that is read. What is written says 3 if any factors are packed, else 2 if
        anything is in eight bits, else 1.
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
        /,
        linears: Any = None,
        splits: Any = None,
        kv_cache: Any = None,
        rounded: Any = None,
        format_version: Any = REMAPPED_VERSION,
        quant_method: Any = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CheckpointError(f"quantization_config has unknown keys: {', '.join(unknown)}")
        if quant_method != QUANT_METHOD:
            raise CheckpointError(f"quant_method is '{quant_method}', not '{QUANT_METHOD}'")
        if format_version not in (FORMAT_VERSION, INT8_VERSION, REMAPPED_VERSION):
            raise CheckpointError(
                f"the checkpoint has format version {format_version}; this slimrank reads versions "
                f"{FORMAT_VERSION} to {REMAPPED_VERSION}: upgrade slimrank"
            )
        if not isinstance(linears, Mapping):
            raise CheckpointError("quantization_config.linears is no mapping of names to ranks")
        self.quant_method = quant_method
        self.linears = _entries(LowRankLinearConfig, "linears", linears)
        self.splits = _entries(SplitConfig, "splits", splits)
        self.kv_cache = _entries(LatentConfig, "kv_cache", kv_cache)
        self.rounded = _entries(RoundedLinearConfig, "rounded", rounded)
        remapped = any(linear.remapped is not None for linear in self.linears.values())
        rounded_version = INT8_VERSION if self.int8_linears else FORMAT_VERSION
        self.format_version = REMAPPED_VERSION if remapped else rounded_version
        if format_version < self.format_version:
            what = "packed factors" if remapped and format_version == INT8_VERSION else "8 bits"
            raise CheckpointError(
                f"quantization_config says format version {format_version}, which has no {what}"
            )
        for entry in self.kv_cache.values():
            for name in (entry.keys, entry.values):
                if name not in self.linears:
                    raise CheckpointError(
                        f"quantization_config.kv_cache names {name}, which is not factorised"
                    )

    @property
    def int8_linears(self) -> list[str]:
        """Names of the linears in eight bits, all or in part, factorised ones first."""
        stored = {n: (linear.bits, linear.remapped) for n, linear in self.linears.items()}
        return [n for n, kinds in stored.items() if any(kinds)] + [*self.rounded]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        values: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "linears": {
                name: linear.model_dump(exclude_none=True) for name, linear in self.linears.items()
            },
        }
        parts: dict[str, Mapping[str, BaseModel]] = {
            "splits": self.splits,
            "kv_cache": self.kv_cache,
            "rounded": self.rounded,
        }
        for key, entries in parts.items():
            if entries:
                values[key] = {name: e.model_dump(mode="json") for name, e in entries.items()}
        return values


def _entries(kind: type[Entry], part: str, values: Any) -> dict[str, Entry]:
    """Check a part of the configuration, which may be left out."""
    if values is not None and not isinstance(values, Mapping):
        raise CheckpointError(f"quantization_config.{part} is no mapping of names")
    return {name: _entry(kind, part, name, value) for name, value in (values or {}).items()}


def _entry(kind: type[Entry], part: str, name: str, value: Any) -> Entry:
    if not name.isprintable():
        raise CheckpointError(f"quantization_config.{part} has a name that is none: {name!r}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"])])
        raise CheckpointError(f"quantization_config.{part}.{key}: {first['msg']}") from error
