"""All that a loader needs to know, as it stands in ``config.json``."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimrank.errors import CheckpointError

QUANT_METHOD = "low_rank"
FORMAT_VERSION = 1


class LowRankLinearConfig(BaseModel):
    """One factorised linear."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(ge=1)
    pivoted: bool = False


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a compressed checkpoint.

    It sits in the quantiser's place because that is where transformers lets a package swap modules
    before weights are loaded; nothing is quantised.

    Parameters
    ----------
    linears : mapping of str to LowRankLinearConfig or mapping
        The factorised linears by full module name; what is not listed is dense.
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
        self.linears = {name: _linear(name, value) for name, value in linears.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "linears": {name: linear.model_dump() for name, linear in self.linears.items()},
        }


def _linear(name: str, value: Any) -> LowRankLinearConfig:
    try:
        linear = LowRankLinearConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *(str(part) for part in first["loc"])])
        raise CheckpointError(f"quantization_config.linears.{key}: {first['msg']}") from error
    if linear.pivoted:
        raise CheckpointError(f"{name} is pivoted, a layout this version does not read")
    return linear
