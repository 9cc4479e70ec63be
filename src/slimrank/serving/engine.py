"""What the plugins of engines share; each mixes it into the classes that its engine asks for."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.checkpoint import (
    QUANT_METHOD,
    LowRankConfig,
    LowRankLinearConfig,
    RoundedLinearConfig,
)
from slimrank.errors import CheckpointError
from slimrank.serving.fused import FusedLinear
from slimrank.serving.member import KINDS, Member

SHARDS = {"q": 0, "k": 1, "v": 2}
Entry = LowRankLinearConfig | RoundedLinearConfig


class ServedFolder:
    """The ``quantization_config`` of a folder, as engines ask for it.

    Parameters
    ----------
    config : LowRankConfig

    Attributes
    ----------
    engine : str
        Its name, for errors.
    linears : dict of str to LowRankLinearConfig or RoundedLinearConfig
        Those with factors and those in eight bits, by full name.
    packed_modules_mapping : dict of str to list of str
        What the engine fuses: the last part of its name, and of those in the checkpoint.

    Raises
    ------
    CheckpointError
        If the folder has something that engines cannot serve.
    """

    engine: str
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__()
        packed = any(entry.remapped for entry in config.linears.values())
        strange = {"packed factors": packed, "projections taken apart": config.splits}
        for what, is_there in strange.items():
            if is_there:
                raise CheckpointError(f"{self.engine} cannot serve this folder: it has {what}")
        self.linears: dict[str, Entry] = {**config.linears, **config.rounded}

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

    def factors_of(self, prefix: str) -> tuple[list[str], list[Entry | None]] | None:
        """Linears of the checkpoint that are one to the engine, if any of them is not as it was.

        Parameters
        ----------
        prefix : str
            Full name of the engine's linear.

        Returns
        -------
        tuple of (names, entries), or None
            An entry is None if that linear is dense and in floats.
        """
        parent, _, leaf = prefix.rpartition(".")
        is_one = prefix in self.linears
        fused = [leaf] if is_one else self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{name}" if parent else name for name in fused]
        if not any(name in self.linears for name in names):
            return None
        return names, [self.linears.get(name) for name in names]


class ServedLinear:
    """Loads the tensors of one linear of an engine and computes it.

    Parameters
    ----------
    names : list of str
        Linears of the checkpoint that are one here.
    entries : list of LowRankLinearConfig, RoundedLinearConfig or None
        None of one that is dense and in floats.
    dense : object
        The engine's own method for linears in floats, by which factors are multiplied.

    Attributes
    ----------
    engine : str
        Its name, for errors.
    """

    engine: str

    def __init__(self, names: list[str], entries: list[Entry | None], dense: Any) -> None:
        self.names, self.entries, self.dense = names, entries, dense

    def rows_of(self, layer: Any, number: int) -> tuple[int, int]:
        """Which part of a linear's outputs is computed here, and of how many."""
        raise NotImplementedError

    def columns_of(self, layer: Any) -> int:
        """Which part of the inputs arrives here; 0 if all of them do."""
        raise NotImplementedError

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002  # engines give all by position
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer parameters under the names of the checkpoint, empty until they are loaded.

        Ranks differ, and of pivoted rows it shows only when they are read which of them are here.

        Raises
        ------
        CheckpointError
            If one matrix of the checkpoint is several to the engine, which may reorder its rows.
        """
        if len(output_partition_sizes) != len(self.names):
            raise CheckpointError(
                f"{self.engine} cannot serve factors of {self.names[0]}: to {self.engine} it is "
                f"{len(output_partition_sizes)} matrices; leave it dense"
            )
        start = self.columns_of(layer) * input_size_per_partition
        columns = range(start, start + input_size_per_partition)
        members = []
        for number, size in enumerate(output_partition_sizes):
            (part, parts), entry = self.rows_of(layer, number), self.entries[number]
            low_rank = entry if isinstance(entry, LowRankLinearConfig) else None
            members.append(
                Member(
                    self.names[number],
                    (size * parts, input_size),
                    range(part * size, (part + 1) * size),
                    columns,
                    None if low_rank is None else low_rank.rank,
                    low_rank is not None and low_rank.pivoted,
                    entry is not None and entry.bits is not None,
                )
            )
        _add_parameters(layer, FusedLinear(members), params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay out what was loaded.

        Raises
        ------
        CheckpointError
            If a tensor is missing.
        """
        if layer.computed is None:
            make = partial(EngineLinear, self.dense)
            layer.computed = layer.fused.finished(layer.weight.device, layer.dtype_of_weights, make)
            del layer.latent, layer.expand, layer.pivots, layer.codes, layer.scale

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute outputs; those of a layer whose inputs are sharded are summed by the engine."""
        if layer.computed is None:
            raise CheckpointError(f"{self.engine} runs {self.names[0]} before it was loaded")
        outputs: Tensor = layer.computed(x)
        return outputs if bias is None else outputs + bias


class EngineLinear(nn.Module):
    """One product by the engine's method for dense linears: its kernels, laid out as they want it.

    Parameters
    ----------
    method : object
        It is told that `weight` is loaded, and may put anything in its place.
    weight : Tensor of shape (out, in)
    """

    bias: None = None

    def __init__(self, method: Any, weight: Tensor) -> None:
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(weight, requires_grad=False)
        method.process_weights_after_loading(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        outputs: Tensor = self.method.apply(self, inputs)
        return outputs


def _add_parameters(layer: Any, fused: FusedLinear, dtype_of_weights: torch.dtype) -> None:
    """Register empty parameters that hand on what is loaded into them."""
    layer.fused, layer.computed, layer.dtype_of_weights = fused, None, dtype_of_weights
    layer.latent, layer.expand = nn.Module(), nn.Module()
    dtypes = {"pivots": torch.int32, "codes": torch.int8}
    for kind in KINDS:
        part, _, name = kind.rpartition(".")
        parameter: Any = nn.Parameter(
            torch.empty(0, dtype=dtypes.get(name, dtype_of_weights)), requires_grad=False
        )
        parameter.weight_loader = partial(_load, fused, kind)
        layer.get_submodule(part).register_parameter(name, parameter)


def _load(
    fused: FusedLinear, kind: str, _: nn.Parameter, tensor: Tensor, shard: str | int | None = None
) -> None:
    """Load as an engine asks for it: which shard it is comes beside the tensor, or on it."""
    shard = getattr(tensor, "shard_id", None) if shard is None else shard
    number = SHARDS.get(shard, 0) if isinstance(shard, str) else shard or 0
    fused.load(number, kind, tensor)
