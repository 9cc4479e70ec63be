"""Finished blocks of an unfinished run: tensors, and then the entry without which none counts."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slimrank.checkpoint.durable import (
    Frozen,
    damaged,
    file_hash,
    read_sealed,
    sealed,
    write_durably,
)
from slimrank.errors import CheckpointError
from slimrank.report import BlockReport, LinearReport


class FinishedBlock(Frozen):
    """One block that is done.

    Parameters
    ----------
    index : int
    file, sha256 : str
        Where its tensors are, and the hash of that file.
    linears : tuple of LinearReport
    block : BlockReport or None
        Of a sequential run. In one-shot order there is none, and the tensors are those of the
        factorised linears alone.
    warnings : tuple of str
        Given while it was worked on.
    """

    index: int
    file: str
    sha256: str
    linears: tuple[LinearReport, ...]
    block: BlockReport | None
    warnings: tuple[str, ...] = ()


def write_finished(
    folder: Path,
    index: int,
    tensors: Mapping[str, Tensor],
    linears: Sequence[LinearReport],
    block: BlockReport | None,
    warnings: Sequence[str],
) -> FinishedBlock:
    """Write the tensors of a block, and then its entry (see `RunState.save`)."""
    content = save(_separate(tensors))
    name = _block_name(index)
    entry = FinishedBlock(
        index=index,
        file=f"{name}.safetensors",
        sha256=hashlib.sha256(content).hexdigest(),
        linears=tuple(linears),
        block=block,
        warnings=tuple(warnings),
    )
    write_durably(folder, entry.file, content)
    write_durably(folder, f"{name}.json", sealed(entry))
    return entry


def read_all_finished(folder: Path) -> list[FinishedBlock]:
    """Read the entries of all blocks, and check the files of their tensors.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged.
    """
    count = len(list(folder.glob("block-*.json")))
    return [_read_finished(folder, index) for index in range(count)]


def read_tensors(folder: Path, entry: FinishedBlock) -> dict[str, Tensor]:
    """Read the tensors of a block, on the CPU and bit for bit as they were saved.

    Raises
    ------
    CheckpointError
        If the file is damaged or cannot be read.
    """
    path = folder / entry.file
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointError(damaged(path, _delete_from(folder, entry.index)))
        return load(content)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def files_of(entry: FinishedBlock) -> tuple[str, str]:
    """Names of the files of a block, in the order in which they are to be deleted."""
    return f"{_block_name(entry.index)}.json", entry.file


def _read_finished(folder: Path, index: int) -> FinishedBlock:
    """Read a block's entry, and check the file of its tensors."""
    name, advice = _block_name(index), _delete_from(folder, index)
    if not (folder / f"{name}.json").exists():
        raise CheckpointError(f"{folder} lacks {name}.json, but holds later blocks; {advice}")
    entry = read_sealed(folder / f"{name}.json", FinishedBlock, advice)
    path = folder / f"{name}.safetensors"
    if entry.index != index or entry.file != path.name:
        raise CheckpointError(f"{folder / name}.json is of block {entry.index}; {advice}")
    if not path.exists():
        raise CheckpointError(f"{folder} lacks {path.name}; {advice}")
    try:
        digest = file_hash(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if digest != entry.sha256:
        raise CheckpointError(damaged(path, advice))
    return entry


def _block_name(index: int) -> str:
    return f"block-{index:04d}"


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors asks for."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _delete_from(folder: Path, index: int) -> str:
    return f"delete {_block_name(index)}.* and the blocks after it, or all of {folder}"
