"""What is finished of a sequential run, kept beside its output so that the run can be resumed.

The folder holds a manifest, and of each finished block two files: its tensors, and then a small
JSON file without which the block does not count. Every file is written under a passing name,
brought to the disk and renamed, so a run that is killed at any moment leaves a folder that can be
resumed.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slimrank.checkpoint.durable import (
    LOCK,
    Frozen,
    damaged,
    locked,
    read_sealed,
    remove_passing,
    sealed,
    sync_folder,
    write_durably,
)
from slimrank.errors import CheckpointError
from slimrank.report import AllocationReport, BlockReport, LinearReport

MANIFEST = "run.json"


class RunManifest(Frozen):
    """What a run is of; a resumed one must be of the same.

    Parameters
    ----------
    recipe_fingerprint, model_fingerprint, calibration_fingerprint : str
        SHA-256 of the settings, of the dense parameters, and of the token ids.
    dtype : str
        Of the model.
    versions : dict of str to str
        Of packages, and device and threads. Where they differ a run can go on, but its bits may
        not be those of a run that was never cut off.
    ranks : dict of str to int or None
        Of the targeted linears; None leaves one dense.
    allocation : AllocationReport or None
        None for uniform ranks.
    """

    format_version: Literal[1] = 1
    recipe_fingerprint: str
    model_fingerprint: str
    calibration_fingerprint: str
    dtype: str
    versions: dict[str, str]
    ranks: dict[str, int | None]
    allocation: AllocationReport | None


class FinishedBlock(Frozen):
    """One block that is done.

    Parameters
    ----------
    index : int
    file, sha256 : str
        Where its tensors are, and the hash of that file.
    linears : tuple of LinearReport
    block : BlockReport
    warnings : tuple of str
        Given while it was worked on.
    """

    index: int
    file: str
    sha256: str
    linears: tuple[LinearReport, ...]
    block: BlockReport
    warnings: tuple[str, ...] = ()


def state_folder(out: Path) -> Path:
    """Name the folder in which an unfinished run is kept.

    Examples
    --------
    >>> state_folder(Path("models/small")).as_posix()
    'models/.small.unfinished'
    """
    return out.parent / f".{out.name}.unfinished"


def has_run(out: Path) -> bool:
    """Tell whether an unfinished run is kept for a folder."""
    return (state_folder(out) / MANIFEST).exists()


def require_no_run(out: Path) -> None:
    """See that no unfinished run is in the way, before any work.

    Raises
    ------
    CheckpointError
        If there is one.
    """
    if has_run(out):
        raise CheckpointError(
            f"an unfinished run is in {state_folder(out)}; go on with --resume, or delete it"
        )


@final
@dataclass(slots=True, eq=False)
class RunState:
    """The finished part of a run, open to one process at a time.

    Made by `begin` or `resume`; `close`, or leaving it as a context manager, lets other processes
    in again. A killed process needs neither.

    Parameters
    ----------
    folder : Path
    manifest : RunManifest
    finished : list of FinishedBlock
        Blocks 0, 1, … without a gap.
    """

    folder: Path
    manifest: RunManifest
    finished: list[FinishedBlock]
    _lock: ExitStack

    @classmethod
    def begin(cls, out: Path, manifest: RunManifest) -> "RunState":
        """Make the folder of a new run.

        Parameters
        ----------
        out : Path
            Of the run; the folder is `state_folder` of it.
        manifest : RunManifest

        Raises
        ------
        CheckpointError
            If there is an unfinished run, another process works on it, or the disk refuses.
        """
        folder = state_folder(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error
        with locked(folder, out) as lock:
            require_no_run(out)
            remove_passing(folder)
            if any(path.name != LOCK for path in folder.iterdir()):
                raise CheckpointError(f"{folder} holds files but no {MANIFEST}; delete it")
            write_durably(folder, MANIFEST, sealed(manifest))
            return cls(folder, manifest, [], lock.pop_all())

    @classmethod
    def resume(cls, out: Path) -> "RunState":
        """Open what a run that was cut off has left, and check the hash of every file.

        Parameters
        ----------
        out : Path
            Of the run that was cut off.

        Raises
        ------
        CheckpointError
            If there is none, another process works on it, or a file is missing, damaged or of
            another version.
        """
        folder = state_folder(out)
        if not folder.is_dir():
            raise CheckpointError(f"there is no unfinished run for {out}; start without --resume")
        with locked(folder, out) as lock:
            if not has_run(out):
                raise CheckpointError(
                    f"nothing is finished in {folder}, it has no {MANIFEST}; start without --resume"
                )
            manifest = read_sealed(folder / MANIFEST, RunManifest, f"delete {folder}")
            remove_passing(folder)
            count = len(list(folder.glob("block-*.json")))
            finished = [_read_finished(folder, index) for index in range(count)]
            return cls(folder, manifest, finished, lock.pop_all())

    def require(
        self,
        *,
        recipe_fingerprint: str,
        model_fingerprint: str,
        calibration_fingerprint: str,
        dtype: str,
    ) -> None:
        """See that what is to go on is what was begun.

        Raises
        ------
        CheckpointError
            With all that differs, in one line.
        """
        pairs = {
            "recipe": (self.manifest.recipe_fingerprint, recipe_fingerprint),
            "model": (self.manifest.model_fingerprint, model_fingerprint),
            "calibration text": (self.manifest.calibration_fingerprint, calibration_fingerprint),
            f"dtype ({self.manifest.dtype}, not {dtype})": (self.manifest.dtype, dtype),
        }
        others = [name for name, (begun, now) in pairs.items() if begun != now]
        if others:
            raise CheckpointError(
                f"the unfinished run in {self.folder} was begun with another {', '.join(others)}; "
                "give what it was begun with, or delete it"
            )

    def differences(self, versions: Mapping[str, str]) -> list[str]:
        """Say what is not as it was when the run was begun.

        Parameters
        ----------
        versions : mapping of str to str
            Of now, with the keys of the manifest's.

        Returns
        -------
        list of str
            Such as ``'torch 2.13.0 -> 2.14.0'``.
        """
        begun = self.manifest.versions
        return [
            f"{name} {begun.get(name, 'none')} -> {versions.get(name, 'none')}"
            for name in dict.fromkeys((*begun, *versions))
            if begun.get(name) != versions.get(name)
        ]

    def save(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        linears: Sequence[LinearReport],
        block: BlockReport,
        warnings: Sequence[str] = (),
    ) -> None:
        """Keep the next block. It counts as finished once this returns.

        Parameters
        ----------
        index : int
            The number of blocks that are finished.
        tensors : mapping of str to Tensor
            On any device, empty and shared ones included; shared ones are stored twice.
        linears : sequence of LinearReport
        block : BlockReport
        warnings : sequence of str

        Raises
        ------
        CheckpointError
            If it is not the next block, or the disk is full or refuses.
        """
        if index != len(self.finished):
            raise CheckpointError(
                f"block {index} cannot be kept in {self.folder}: block {len(self.finished)} is next"
            )
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
        write_durably(self.folder, entry.file, content)
        write_durably(self.folder, f"{name}.json", sealed(entry))
        self.finished.append(entry)

    def load(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a finished block, on the CPU and bit for bit as they were saved.

        Raises
        ------
        CheckpointError
            If the block is not finished, or its file is damaged.
        """
        if not 0 <= index < len(self.finished):
            raise CheckpointError(f"block {index} is not finished in {self.folder}")
        path = self.folder / self.finished[index].file
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != self.finished[index].sha256:
                raise CheckpointError(damaged(path, _delete_from(self.folder, index)))
            return load(content)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def remove(self) -> None:
        """Delete the folder, from the last block to the first, and let go of it.

        Raises
        ------
        CheckpointError
            If the disk refuses.
        """
        try:
            for entry in reversed(self.finished):  # cut off here, what is left can be resumed
                (self.folder / f"{_block_name(entry.index)}.json").unlink(missing_ok=True)
                (self.folder / entry.file).unlink(missing_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"cannot remove {self.folder}: {error.strerror}; delete it by hand"
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """Let other processes at the folder. May be called twice."""
        self._lock.close()

    def __enter__(self) -> "RunState":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if digest != entry.sha256:
        raise CheckpointError(damaged(path, advice))
    return entry


def _delete_from(folder: Path, index: int) -> str:
    return f"delete {_block_name(index)}.* and the blocks after it, or all of {folder}"
