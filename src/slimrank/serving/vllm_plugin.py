"""vLLM serves compressed folders: ``vllm serve DIR``, with nothing imported by the user.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). Every
linear that the folder has factors of gets a method of its own; all others are vLLM's.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig, LowRankLinearConfig
from slimrank.errors import CheckpointError
from slimrank.serving.fused import KINDS, FusedLinear, Member

SHARDS = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Tell vLLM of the format; once in a process."""
    from vllm.model_executor.layers import quantization

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(LowRankServing)


class LowRankServing(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a folder, as vLLM asks for it.

    Parameters
    ----------
    config : LowRankConfig

    Raises
    ------
    CheckpointError
        If the folder has something that vLLM cannot serve.
    """

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__()
        rounded = bool(config.int8_linears) or any(x.remapped for x in config.linears.values())
        strange = {"factors in eight bits": rounded, "projections taken apart": config.splits}
        for what, is_there in strange.items():
            if is_there:
                raise CheckpointError(f"vLLM cannot serve this folder: it has {what}")
        self.linears: dict[str, LowRankLinearConfig] = dict(config.linears)

    def get_name(self) -> str:
        """Give its name in ``config.json``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Whatever models run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No kernel of its own, so any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All stands in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LowRankServing":
        """Read and check it."""
        return cls(LowRankConfig(**config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Name linears as vLLM does, but for those that it fuses."""
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Give a linear with factors our method; any other linear vLLM's."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{name}" if parent else name for name in fused]
        if not any(name in self.linears for name in names):
            return UnquantizedLinearMethod()
        return LowRankMethod(names, [self.linears.get(name) for name in names])


class LowRankMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads the tensors of one linear of vLLM and computes it.

    Parameters
    ----------
    names : list of str
        Linears of the checkpoint that are one here.
    entries : list of LowRankLinearConfig or None
        None of one that is dense.
    """

    def __init__(self, names: list[str], entries: list[LowRankLinearConfig | None]) -> None:
        self.names, self.entries = names, entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002  # vLLM gives all by position
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer parameters under the names of the checkpoint, empty until they are loaded.

        Ranks differ, and of pivoted rows it shows only when they are read which of them are here.

        Raises
        ------
        CheckpointError
            If one matrix of the checkpoint is several to vLLM, which may reorder its rows.
        """
        if len(output_partition_sizes) != len(self.names):
            raise CheckpointError(
                f"vLLM cannot serve factors of {self.names[0]}: to vLLM it is "
                f"{len(output_partition_sizes)} matrices; leave it dense"
            )
        own = range(input_size_per_partition)
        if isinstance(layer, RowParallelLinear):
            start = layer.tp_rank * input_size_per_partition
            own = range(start, start + input_size_per_partition)
        layer.fused = FusedLinear(
            [
                self._member(layer, number, size, input_size, own)
                for number, size in enumerate(output_partition_sizes)
            ]
        )
        layer.computed, layer.dtype_of_weights = None, params_dtype
        for kind in KINDS:
            dtype = torch.int32 if kind == "pivots" else params_dtype
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = partial(_load, layer.fused, kind)
            owner, name = layer, kind
            if kind in ("latent", "expand"):
                owner, name = nn.Module(), "weight"
                layer.add_module(kind, owner)
            owner.register_parameter(name, parameter)

    def _member(
        self, layer: Any, number: int, size: int, input_size: int, columns: range
    ) -> Member:
        part, parts = layer.tp_rank, layer.tp_size
        if isinstance(layer, QKVParallelLinear) and number:
            copies = layer.num_kv_head_replicas
            part, parts = part // copies, parts // copies
        if isinstance(layer, RowParallelLinear):
            part, parts = 0, 1
        entry = self.entries[number]
        return Member(
            self.names[number],
            (size * parts, input_size),
            range(part * size, (part + 1) * size),
            columns,
            None if entry is None else entry.rank,
            entry is not None and entry.pivoted,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay out what was loaded.

        Raises
        ------
        CheckpointError
            If a tensor is missing.
        """
        if layer.computed is None:
            layer.computed = layer.fused.finished(layer.weight.device, layer.dtype_of_weights)
            del layer.latent, layer.expand, layer.pivots

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute outputs; those of a layer whose inputs are sharded are summed by vLLM."""
        outputs: Tensor = layer.computed(x)
        return outputs if bias is None else outputs + bias


def _load(
    fused: FusedLinear, kind: str, _: nn.Parameter, tensor: Tensor, shard: str | int | None = None
) -> None:
    """Load as vLLM asks for it: which shard it is comes beside the tensor, or on it."""
    shard = getattr(tensor, "shard_id", None) if shard is None else shard
    number = SHARDS.get(shard, 0) if isinstance(shard, str) else shard or 0
    fused.load(number, kind, tensor)
