"""What the plugins of engines share; each mixes it into the classes that its engine asks for."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.checkpoint import QUANT_METHOD, LowRankConfig, LowRankLinearConfig
from slimrank.errors import CheckpointError
from slimrank.serving.fused import KINDS, FusedLinear, Member

SHARDS = {"q": 0, "k": 1, "v": 2}


class ServedFolder:
    """The ``quantization_config`` of a folder, as engines ask for it.

    Parameters
    ----------
    config : LowRankConfig

    Attributes
    ----------
    engine : str
        Its name, for errors.
    linears : dict of str to LowRankLinearConfig
        Those with factors, by full name.
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
        rounded = bool(config.int8_linears) or any(x.remapped for x in config.linears.values())
        strange = {"factors in eight bits": rounded, "projections taken apart": config.splits}
        for what, is_there in strange.items():
            if is_there:
                raise CheckpointError(f"{self.engine} cannot serve this folder: it has {what}")
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

    def factors_of(self, prefix: str) -> tuple[list[str], list[LowRankLinearConfig | None]] | None:
        """Linears of the checkpoint that are one to the engine, if any of them has factors.

        Parameters
        ----------
        prefix : str
            Full name of the engine's linear.

        Returns
        -------
        tuple of (names, entries), or None
            An entry is None if that linear is dense.
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
    entries : list of LowRankLinearConfig or None
        None of one that is dense.

    Attributes
    ----------
    engine : str
        Its name, for errors.
    """

    engine: str

    def __init__(self, names: list[str], entries: list[LowRankLinearConfig | None]) -> None:
        self.names, self.entries = names, entries

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
            members.append(
                Member(
                    self.names[number],
                    (size * parts, input_size),
                    range(part * size, (part + 1) * size),
                    columns,
                    None if entry is None else entry.rank,
                    entry is not None and entry.pivoted,
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
            layer.computed = layer.fused.finished(layer.weight.device, layer.dtype_of_weights)
            del layer.latent, layer.expand, layer.pivots

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute outputs; those of a layer whose inputs are sharded are summed by the engine."""
        if layer.computed is None:
            raise CheckpointError(f"{self.engine} runs {self.names[0]} before it was loaded")
        outputs: Tensor = layer.computed(x)
        return outputs if bias is None else outputs + bias


def _add_parameters(layer: Any, fused: FusedLinear, dtype_of_weights: torch.dtype) -> None:
    """Register empty parameters that hand on what is loaded into them."""
    layer.fused, layer.computed, layer.dtype_of_weights = fused, None, dtype_of_weights
    for kind in KINDS:
        dtype = torch.int32 if kind == "pivots" else dtype_of_weights
        parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = partial(_load, fused, kind)
        owner, name = layer, kind
        if kind in ("latent", "expand"):
            owner, name = nn.Module(), "weight"
            layer.add_module(kind, owner)
        owner.register_parameter(name, parameter)


def _load(
    fused: FusedLinear, kind: str, _: nn.Parameter, tensor: Tensor, shard: str | int | None = None
) -> None:
    """Load as an engine asks for it: which shard it is comes beside the tensor, or on it."""
    shard = getattr(tensor, "shard_id", None) if shard is None else shard
    number = SHARDS.get(shard, 0) if isinstance(shard, str) else shard or 0
    fused.load(number, kind, tensor)
