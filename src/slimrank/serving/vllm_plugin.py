"""vLLM serves compressed folders: ``vllm serve DIR``, with nothing imported by the user.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). Every
linear that the folder has factors of gets a method of its own; all others are vLLM's.
"""

from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from slimrank.checkpoint import QUANT_METHOD, LowRankConfig
from slimrank.serving.engine import ServedFolder, ServedLinear


def register() -> None:
    """Tell vLLM of the format; once in a process."""
    from vllm.model_executor.layers import quantization

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(LowRankServing)


class LowRankServing(ServedFolder, QuantizationConfig):  # type: ignore[misc]
    """What vLLM makes of the ``quantization_config``; `ServedFolder` says what is refused."""

    engine = "vLLM"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowRankServing":
        """Read and check it."""
        return cls(LowRankConfig(**config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name linears as vLLM does, but for those that it fuses."""
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Give a linear with factors, or in eight bits, our method; any other linear vLLM's."""
        if not isinstance(layer, LinearBase):
            return None
        found, dense = self.factors_of(prefix), UnquantizedLinearMethod()
        return dense if found is None else LowRankMethod(*found, dense)


class LowRankMethod(ServedLinear, LinearMethodBase):  # type: ignore[misc]
    """Where vLLM's shards of a linear begin and end."""

    engine = "vLLM"

    def rows_of(self, layer: Any, number: int) -> tuple[int, int]:
        """Heads of keys and values may be there several times."""
        if isinstance(layer, RowParallelLinear):
            return 0, 1
        copies = (
            layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number else 1
        )
        return layer.tp_rank // copies, layer.tp_size // copies

    def columns_of(self, layer: Any) -> int:
        """Only a row-parallel linear gets a part of the inputs."""
        return int(layer.tp_rank) if isinstance(layer, RowParallelLinear) else 0
