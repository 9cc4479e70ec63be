"""SGLang serves compressed folders. Experimental: written against 0.5.23, and not run there yet.

SGLang calls `register` in its processes (entry point group ``sglang.srt.plugins``). Every linear
that the folder has factors of gets a method of its own; all others are SGLang's.
"""

from typing import Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.server_args import add_quantization_method_choices
from torch import nn

from slimrank.checkpoint import QUANT_METHOD, LowRankConfig
from slimrank.errors import CheckpointError
from slimrank.serving.engine import ServedFolder, ServedLinear

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ADDED = ("packed_modules_mapping", "hf_config")  # by SGLang, to what stands in config.json


def register() -> None:
    """Tell SGLang of the format; once in a process."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        QUANTIZATION_METHODS[QUANT_METHOD] = LowRankServing
        add_quantization_method_choices([QUANT_METHOD])


class LowRankServing(ServedFolder, QuantizationConfig):  # type: ignore[misc]
    """What SGLang makes of the ``quantization_config``; `ServedFolder` says what is refused."""

    engine = "SGLang"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowRankServing":
        """Read and check it. Many models of SGLang do not say what they fuse; all fuse alike."""
        served = cls(LowRankConfig(**{k: v for k, v in config.items() if k not in ADDED}))
        served.packed_modules_mapping = FUSED | (config.get("packed_modules_mapping") or {})
        return served

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Name linears as SGLang does, but for those that it fuses."""
        self.linears = hf_to_sglang_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Give a linear with factors, or in eight bits, our method; any other linear SGLang's."""
        if not isinstance(layer, LinearBase):
            return None
        found, dense = self.factors_of(prefix), UnquantizedLinearMethod()
        return dense if found is None else LowRankMethod(*found, dense)

    def get_scaled_act_names(self) -> list[str]:
        """None: activations stay what they are."""
        return []


class LowRankMethod(ServedLinear, LinearMethodBase):  # type: ignore[misc]
    """Where SGLang's shards of a linear begin and end."""

    engine = "SGLang"

    def rows_of(self, layer: Any, number: int) -> tuple[int, int]:
        """Heads of keys and values may be there several times, or be shared out otherwise."""
        if isinstance(layer, RowParallelLinear):
            return 0, 1
        if isinstance(layer, QKVParallelLinear) and number:
            part, parts = get_group_rank_size(layer.kv_tp_group)
            return part // layer.num_kv_head_replicas, parts // layer.num_kv_head_replicas
        part, parts = get_group_rank_size(layer.tp_group)
        return part, parts

    def columns_of(self, layer: Any) -> int:
        """Only a row-parallel linear gets a part of the inputs."""
        is_row_parallel = isinstance(layer, RowParallelLinear)
        return int(get_group_rank_size(layer.tp_group)[0]) if is_row_parallel else 0

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Refuse other weights: what was laid out is not what a checkpoint holds.

        Raises
        ------
        CheckpointError
            Always; SGLang asks before it writes any.
        """
        del layer
        raise CheckpointError(
            "SGLang cannot exchange the weights of a compressed folder while it runs: start it anew"
        )
