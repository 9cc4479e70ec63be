"""As much of SGLang 0.5.23 as the plugin touches: its registry, its linears, and how it loads.

SGLang itself needs a GPU. What is here was written from reading its source; names, arguments and
the order of calls are its own.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHOICES: list[str] = []
STACKED = (
    (".qkv_proj", ".q_proj", "q"),
    (".qkv_proj", ".k_proj", "k"),
    (".qkv_proj", ".v_proj", "v"),
    (".gate_up_proj", ".gate_proj", 0),
    (".gate_up_proj", ".up_proj", 1),
)


class Group:
    """Processes that share a linear."""

    def __init__(self, rank_in_group: int, world_size: int) -> None:
        self.rank_in_group, self.world_size = rank_in_group, world_size


def get_group_rank_size(group: Group | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank_in_group, group.world_size)


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...

    @abstractmethod
    def get_scaled_act_names(self) -> list[str]: ...


class LinearMethodBase(ABC):
    @abstractmethod
    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def process_weights_after_loading(self, layer: Any) -> None:
        del layer


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None: ...

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    tp_group: Group | None = None

    def __init__(self, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)


class ReplicatedLinear(LinearBase):
    def __init__(self, inputs: int, outputs: int, quant_config: Any, prefix: str) -> None:
        super().__init__(quant_config, prefix)
        self.quant_method.create_weights(
            self, inputs, [outputs], inputs, outputs, torch.float32, weight_loader=None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, None)


class ColumnParallelLinear(LinearBase):
    """Also of several matrices, as `MergedColumnParallelLinear` is there."""

    def __init__(
        self,
        inputs: int,
        outputs: list[int],
        bias: bool,
        quant_config: Any,
        prefix: str,
        group: Any,
    ) -> None:
        super().__init__(quant_config, prefix)
        self.tp_group = group
        _, size = get_group_rank_size(group)
        self.output_partition_sizes = [number // size for number in outputs]
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs,
            output_partition_sizes=self.output_partition_sizes,
            input_size=inputs,
            output_size=sum(outputs),
            params_dtype=torch.float32,
            skip_block_quant_check=False,
            weight_loader=None,
        )
        self.bias: Any = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(sum(self.output_partition_sizes)), False)
            self.bias.weight_loader = self.load_bias

    def part_of(self, shard: str | int) -> int:
        return get_group_rank_size(self.tp_group)[0]

    def load_bias(self, param: Any, tensor: Tensor, shard: str | int = 0) -> None:
        number = "qkv".index(shard) if isinstance(shard, str) else shard
        sizes = self.output_partition_sizes
        start, size = sum(sizes[:number]), sizes[number]
        part = self.part_of(shard)
        param.data[start : start + size] = tensor[part * size : (part + 1) * size]

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        inputs: int,
        head_size: int,
        heads: int,
        kv_heads: int,
        bias: bool,
        quant_config: Any,
        prefix: str,
        group: Any,
        kv_group: Any,
    ) -> None:
        self.__dict__["kv_tp_group"] = kv_group
        _, size = get_group_rank_size(group)
        _, kv_size = get_group_rank_size(kv_group)
        self.__dict__["num_kv_head_replicas"] = max(1, kv_size // kv_heads)
        own = max(1, kv_heads // kv_size) * head_size * size  # as if of all processes
        outputs = [heads * head_size, own, own]
        super().__init__(inputs, outputs, bias, quant_config, prefix, group)

    def part_of(self, shard: str | int) -> int:
        if shard == "q":
            return super().part_of(shard)
        return get_group_rank_size(self.kv_tp_group)[0] // self.num_kv_head_replicas


class RowParallelLinear(LinearBase):
    def __init__(
        self, inputs: int, outputs: int, bias: bool, quant_config: Any, prefix: str, group: Any
    ) -> None:
        super().__init__(quant_config, prefix)
        self.tp_group = group
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=inputs // get_group_rank_size(group)[1],
            output_partition_sizes=[outputs],
            input_size=inputs,
            output_size=outputs,
            params_dtype=torch.float32,
            weight_loader=None,
        )
        self.bias: Any = nn.Parameter(torch.zeros(outputs), False) if bias else None
        if bias:
            self.bias.weight_loader = lambda param, tensor: param.data.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        is_first = get_group_rank_size(self.tp_group)[0] == 0
        return self.quant_method.apply(self, x, bias=self.bias if is_first else None)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """A tensor that nothing asks for is passed by without a word."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in tensors.items():
        for fused, source, shard in STACKED:
            target = name.replace(source, fused)
            if source in name and target in parameters:
                parameters[target].weight_loader(parameters[target], tensor, shard)
                break
        else:
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)


def postprocess_weights(model: nn.Module) -> None:
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)


MODULES: dict[str, dict[str, Any]] = {
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.distributed": {},
    "sglang.srt.distributed.utils": {"get_group_rank_size": get_group_rank_size},
    "sglang.srt.layers": {},
    "sglang.srt.layers.linear": {
        "LinearBase": LinearBase,
        "QKVParallelLinear": QKVParallelLinear,
        "RowParallelLinear": RowParallelLinear,
    },
    "sglang.srt.layers.quantization": {"QUANTIZATION_METHODS": {"fp8": object}},
    "sglang.srt.layers.quantization.base_config": {
        "LinearMethodBase": LinearMethodBase,
        "QuantizationConfig": QuantizationConfig,
    },
    "sglang.srt.layers.quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
    "sglang.srt.server_args": {"add_quantization_method_choices": CHOICES.extend},
}


@contextmanager
def imported() -> Iterator[None]:
    """Let its modules be found, for as long as the plugin is imported."""
    for name, values in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        module.__path__ = []
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in MODULES:
            del sys.modules[name]
