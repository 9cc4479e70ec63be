"""Weights that stay in their files: mapped, read where they are used, and let go of again.

A mapped weight is an ordinary tensor. Its pages are read from the file when they are first touched
and count as resident memory until they are let go of; touched again, they are read again. So a
model of any size is worked on block by block, in code that knows nothing of it.
"""

import copy
import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES as TYPES
from torch import Tensor, nn

from slimrank.errors import CheckpointError

PAGES, HOME, SHARED = "_pages", "_copy_of", "_shared"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
LARGE_PIECE = 2**22
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: files may be larger than memory and swap


@dataclass(frozen=True, slots=True)
class _Pages:
    """Where a parameter lies in its file, and what it was when it was mapped."""

    file: mmap.mmap
    start: int
    length: int
    address: int
    version: int


def map_parameters(path: Path) -> dict[str, nn.Parameter]:
    """Map the tensors of a safetensors file whose header was checked before.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict of str to nn.Parameter
        Without gradients. What is written to them stays in memory and never reaches the file.

    Raises
    ------
    CheckpointError
        If the system maps no such file.
    """
    _hand_out_large_pieces()
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        mapped = _map_privately(file.fileno(), path)
    header.pop("__metadata__", None)
    found: dict[str, nn.Parameter] = {}
    for name, entry in header.items():
        first, end = (8 + size + offset for offset in entry["data_offsets"])
        dtype, shape = TYPES[entry["dtype"]], entry["shape"]
        assert isinstance(dtype, torch.dtype)
        if first == end:
            found[name] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            continue
        count = (end - first) // dtype.itemsize
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=first).view(shape)
        parameter = nn.Parameter(tensor, requires_grad=False)
        # whole pages only: what is left over belongs to neighbours too
        start, stop = -(-first // mmap.PAGESIZE), end // mmap.PAGESIZE
        place = start * mmap.PAGESIZE, max(0, stop - start) * mmap.PAGESIZE
        pages = _Pages(mapped, *place, tensor.data_ptr(), parameter._version)
        setattr(parameter, PAGES, pages)
        found[name] = parameter
    return found


def _map_privately(number: int, path: Path) -> mmap.mmap:
    """Map a file so that writes stay in memory, and count as memory only once they are made."""
    try:
        if sys.platform != "linux":
            return mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
        flags, access = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(number, 0, flags=flags, prot=access)
    except OSError as error:
        raise CheckpointError(f"cannot map {path}: {error.strerror}") from error


def let_go_of(parameters: Iterable[Tensor]) -> bool:
    """Give back the memory that mapped parameters take; tell whether any of them was mapped.

    They are read again when they are touched. One that was written to since stays as it is.
    """
    found = False
    for parameter in parameters:
        pages: _Pages | None = getattr(parameter, PAGES, None)
        if pages is None or not hasattr(mmap, "MADV_DONTNEED"):
            continue
        is_as_mapped = (pages.address, pages.version) == (parameter.data_ptr(), parameter._version)
        if is_as_mapped and pages.length:
            pages.file.madvise(mmap.MADV_DONTNEED, pages.start, pages.length)
            found = True
    return found


def trim() -> None:
    """Give freed memory back: glibc keeps large pieces for itself, other libraries do not."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return _of_glibc("malloc_trim")


@cache
def _hand_out_large_pieces() -> None:
    """Let glibc take pieces of 4 MiB and more from the system, and give them back when freed.

    Left alone it raises that limit to 32 MiB, and what is below lies in a heap that gets more holes
    with each block: its peak had grown by 0.35 GB after 112 blocks. A limit in the environment
    stays.
    """
    settle = _of_glibc("mallopt")
    if settle is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        settle(M_MMAP_THRESHOLD, LARGE_PIECE)
        settle(M_TRIM_THRESHOLD, 2 * LARGE_PIECE)


def _of_glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; weights from files are shared, so neither copy may train them."""
    shared = {id(p): p for p in model.parameters() if _is_mapped(p) or hasattr(p, SHARED)}
    return copy.deepcopy(model, memo=dict(shared))


def is_mapped(model: nn.Module) -> bool:
    """Whether any weight is."""
    return any(map(_is_mapped, model.parameters()))


def _is_mapped(parameter: nn.Parameter) -> bool:
    """Whether it lies in a file, or was copied from there to a device."""
    home = getattr(parameter, HOME, (parameter,))[0]
    return hasattr(home, PAGES)
