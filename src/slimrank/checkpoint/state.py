"""What is finished of a sequential run, kept beside its output so that the run can be resumed.

The folder holds a manifest, and of each finished block two files (see `finished`). Every file is
written under a passing name, brought to the disk and renamed, so a run that is killed at any moment
leaves a folder that can be resumed.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from torch import Tensor

from slimrank.checkpoint.durable import (
    LOCK,
    locked,
    read_sealed,
    remove_passing,
    sealed,
    sync_folder,
    write_durably,
)
from slimrank.checkpoint.finished import (
    FinishedBlock,
    read_all_finished,
    read_tensors,
    remove_finished,
    write_finished,
)
from slimrank.checkpoint.manifest import RunManifest
from slimrank.errors import CheckpointError
from slimrank.report import BlockReport, LinearReport

MANIFEST = "run.json"


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
            finished = read_all_finished(folder)
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
        self.finished.append(write_finished(self.folder, index, tensors, linears, block, warnings))

    def load(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a finished block, on the CPU and bit for bit as they were saved.

        Raises
        ------
        CheckpointError
            If the block is not finished, or its file is damaged.
        """
        if not 0 <= index < len(self.finished):
            raise CheckpointError(f"block {index} is not finished in {self.folder}")
        return read_tensors(self.folder, self.finished[index])

    def remove(self) -> None:
        """Delete the folder, from the last block to the first, and let go of it.

        Raises
        ------
        CheckpointError
            If the disk refuses.
        """
        try:
            for entry in reversed(self.finished):  # cut off here, what is left can be resumed
                remove_finished(self.folder, entry)
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
