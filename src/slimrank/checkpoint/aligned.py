"""Weights that begin on cache lines: the header of a file is padded until most of them do.

transformers leaves weights on a CPU in their file, mapped. As files are written, the first of them
begins at any multiple of 8 bytes, and products with matrices that begin within a line are slower.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

LINE, STEP = 64, 8  # bytes of a cache line, and what the format aligns to
CHUNK = 2**24


def padding(start: int, sizes: Iterable[int]) -> int:
    """By how many bytes to move tensors, so that most of their bytes belong to aligned ones.

    Tensors lie end to end, so one of an odd size shifts all behind it.

    Parameters
    ----------
    start : int
        Where in the file the first tensor begins.
    sizes : iterable of int
        Bytes of the tensors, in the order of the file.

    Returns
    -------
    int
        The smallest of 0, 8, 16 … 56 that does it.

    Examples
    --------
    >>> padding(104, [256, 64])
    24
    >>> padding(104, [128, 8, 256])
    16
    """
    aligned: Counter[int] = Counter()
    for size in sizes:
        aligned[-start % LINE] += size
        start += size
    return max(range(0, LINE, STEP), key=lambda moved: aligned[moved])


def align_folder(folder: Path) -> None:
    """Align the tensors of all weight files that were just written to a folder.

    To be called within `renamed_when_done`: it syncs, removes what is half done, and tells of a
    full disk.

    Parameters
    ----------
    folder : Path
    """
    for file in sorted(folder.glob("*.safetensors")):
        align_file(file)


def align_file(file: Path, chunk: int = CHUNK) -> None:
    """Move the tensors of a safetensors file in place; one that is aligned is not written to.

    Parameters
    ----------
    file : Path
    chunk : int
        Bytes that are in memory at a time.
    """
    with file.open("r+b") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = sorted(entry["data_offsets"] for entry in entries.values())
        start = 8 + len(header)
        moved = padding(start, (end - begin for begin, end in spans))
        if moved:
            _move(opened, start, moved, chunk)
            opened.seek(0)
            opened.write((len(header) + moved).to_bytes(8, "little") + header + b" " * moved)


def _move(opened: BinaryIO, start: int, by: int, chunk: int) -> None:
    """Move what is from `start` on towards the end: the last chunk first, none is overwritten."""
    end = opened.seek(0, os.SEEK_END)
    while end > start:
        begin = max(start, end - chunk)
        opened.seek(begin)
        part = opened.read(end - begin)
        opened.seek(begin + by)
        opened.write(part)
        end = begin
