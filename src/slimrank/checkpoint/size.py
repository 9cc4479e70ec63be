"""Tensors on disk: their headers, and their bytes, to the byte."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as TYPES
from torch import Tensor, nn

from slimrank.checkpoint.aligned import padding
from slimrank.errors import CheckpointError

SHARD_SIZE = "50GB"  # the default of `save_pretrained`
# beside safetensors' own: types that torch has not, sizes that no number holds, names that are none
HEADER_ERRORS = (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError)
NAMES = {dtype: name for name, dtype in TYPES.items()}
# how safetensors orders types of the same width, the last comes first
ORDER = ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32"]
ORDER += ["C64", "F64", "I64", "U64"]


def safetensors_bytes(tensors: Mapping[str, Tensor], aligned: bool = False) -> int:
    """Size of one safetensors file that holds these tensors, as `save_pretrained` writes it.

    Eight bytes of length, a JSON header padded to eight bytes, the tensors end to end.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        May be on the meta device.
    aligned : bool
        Their data begin on cache lines (see `slimrank.checkpoint.aligned`), as slimrank's own do.

    Examples
    --------
    >>> safetensors_bytes({"a": torch.zeros(2, 2)})
    112
    >>> safetensors_bytes({"a": torch.zeros(2, 2)}, aligned=True)
    144
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (_place(item[1].dtype), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    start = 8 + -(-text // 8) * 8
    sizes = (tensor.numel() * tensor.element_size() for _, tensor in ordered)
    return start + (padding(start, sizes) if aligned else 0) + offset


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that `save_pretrained` writes: the state dict, a tied tensor once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    tied = {id(p) for p in model.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in tied:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
        tensors[name] = tensor.detach()
    return tensors


def folder_bytes(
    model: nn.Module,
    ranks: Mapping[str, int] | None = None,
    pivoted: Collection[str] = (),
    *,
    aligned: bool = False,
) -> int:
    """Bytes of the weight files that `save_pretrained` would write for a model, shards included.

    Parameters
    ----------
    model : nn.Module
        May be on the meta device.
    ranks : mapping of str to int, optional
        Count these linears as factors of this rank instead of as they are.
    pivoted : collection of str
        Those of them in the pivoted layout.
    aligned : bool
        The folder is written by slimrank, which aligns what it compresses.
    """
    tensors = {name: torch.empty_like(t, device="meta") for name, t in saved_tensors(model).items()}
    for name, rank in (ranks or {}).items():
        weight = tensors[f"{name}.weight"]
        out_features, in_features = weight.shape
        tensors[f"{name}.weight"] = weight.new_empty(0)
        tensors[f"{name}.latent.weight"] = weight.new_empty(rank, in_features)
        rows = out_features - rank if name in pivoted else out_features
        tensors[f"{name}.expand.weight"] = weight.new_empty(rows, rank)
        if name in pivoted:
            tensors[f"{name}.pivots"] = weight.new_empty(rank, dtype=torch.int32)
    tensors = as_saved(model, tensors)
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)
    return sum(
        safetensors_bytes({name: tensors[name] for name in names}, aligned)
        for names in shards.filename_to_tensors.values()
    )


def as_saved(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from how a model calls them to how its checkpoints do, where that differs."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers before it told the two apart
        return tensors
    return dict(revert_weight_conversion(model, tensors))


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_headers(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the tensors in weight files, as tensors on the meta device.

    Raises
    ------
    CheckpointError
        If a file is no safetensors file, or a damaged one.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(f"{Path(file).name} is no safetensors file")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    dtype = TYPES[part.get_dtype()]
                    tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except HEADER_ERRORS as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    return tensors


def _place(dtype: torch.dtype) -> tuple[int, int]:
    """Where safetensors puts tensors of a dtype: wide ones first."""
    name = NAMES[dtype]
    return -dtype.itemsize, -ORDER.index(name) if name in ORDER else 0
