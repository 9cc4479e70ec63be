"""What is finished of a run, kept beside its output so that the run can be resumed.

The folder holds a manifest, and of each finished block two files (see `finished`). Every file is
written under a passing name, brought to the disk and renamed, so a run that is killed at any moment
leaves a folder that can be resumed. A profile that the ranks are chosen from may lie there too, and
what is only passing: names with a dot in front, which the next run removes.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from torch import Tensor

from slimrank import processes
from slimrank.checkpoint.durable import (
    LOCK,
    locked,
    remove_passing,
    sealed,
    write_durably,
)
from slimrank.checkpoint.finished import (
    FinishedBlock,
    files_of,
    read_all_finished,
    read_tensors,
    write_finished,
)
from slimrank.checkpoint.manifest import RunManifest, require_same
from slimrank.checkpoint.unfinished import (
    Unfinished,
    new_state_folder,
    remove_passing_folders,
    remove_state_folder,
    state_folder,
)
from slimrank.errors import CheckpointError
from slimrank.report import BlockReport, LinearReport, RanksReport

MANIFEST, PROFILE = "run.json", "profile"
UNFINISHED_RUN = Unfinished("run", MANIFEST, RunManifest)


def removed_what_is_left(out: Path, recipe_fingerprint: str) -> bool:
    """Remove the state of a run whose folder stands; tell whether there was one.

    Parameters
    ----------
    out : Path
    recipe_fingerprint : str
        Of the report in the folder.

    Raises
    ------
    CheckpointError
        If another process works on it, the state is damaged, or the disk refuses.
    """
    return out.is_dir() and UNFINISHED_RUN.removed_what_is_left(
        out, lambda begun: begun.recipe_fingerprint == recipe_fingerprint
    )


@final
@dataclass(slots=True, eq=False)
class RunState:
    """The finished part of a run, open to one process at a time, or to those that share a run.

    Of these the first one locks and writes, and the others come after it. Made by `begin` or
    `resume`; `close`, or leaving it as a context manager, lets other processes in again. A killed
    process needs neither.

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
        if not processes.is_first():
            processes.wait()
            return cls(folder, manifest, [], ExitStack())
        with new_state_folder(out) as lock:
            UNFINISHED_RUN.require_none(out)
            remove_passing(folder)
            if any(path.name != LOCK for path in folder.iterdir()):
                raise CheckpointError(f"{folder} holds files but no {MANIFEST}; delete it")
            write_durably(folder, MANIFEST, sealed(manifest))
            processes.wait()
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
        if not processes.is_first():
            processes.wait()
            manifest = UNFINISHED_RUN.read(out)
            state = cls(folder, manifest, read_all_finished(folder), ExitStack())
            processes.wait()
            return state
        with locked(folder, out) as lock:
            if not UNFINISHED_RUN.is_kept(out):
                raise CheckpointError(
                    f"nothing is finished in {folder}, it has no {MANIFEST}; start without --resume"
                )
            manifest = UNFINISHED_RUN.read(out)
            remove_passing(folder)
            remove_passing_folders(folder)
            finished = read_all_finished(folder)
            processes.wait()  # for the others to read
            processes.wait()  # until they have
            return cls(folder, manifest, finished, lock.pop_all())

    def require(
        self,
        *,
        recipe_fingerprint: str,
        model_fingerprint: str,
        calibration_fingerprint: str,
        dtype: str,
        profile_fingerprint: str = "",
    ) -> None:
        """See that what is to go on is what was begun.

        Raises
        ------
        CheckpointError
            With all that differs, in one line.
        """
        manifest = self.manifest
        pairs = {
            "recipe": (manifest.recipe_fingerprint, recipe_fingerprint),
            "model": (manifest.model_fingerprint, model_fingerprint),
            "calibration text": (manifest.calibration_fingerprint, calibration_fingerprint),
            "dtype": (manifest.dtype, dtype),
            "profile": (manifest.profile_fingerprint, profile_fingerprint),
        }
        begun, now = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        require_same(self.folder, "run", begun, now)

    @property
    def profile(self) -> Path:
        """Where the profile is kept that ranks are chosen from, and factors are made from."""
        return self.folder / PROFILE

    @property
    def is_bare(self) -> bool:
        """Whether nothing is finished that would be work to do again."""
        folders = (self.profile, state_folder(self.profile))
        return not (self.finished or self.manifest.allocation or any(x.exists() for x in folders))

    def settle(
        self,
        ranks: Mapping[str, int | None],
        allocation: RanksReport | None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Keep the ranks that were chosen. They count once this returns.

        Parameters
        ----------
        ranks : mapping of str to int or None
        allocation : RanksReport or None
        warnings : sequence of str
            Given while they were chosen.

        Raises
        ------
        CheckpointError
            If the disk is full or refuses.
        """
        chosen = {"ranks": dict(ranks), "allocation": allocation, "warnings": tuple(warnings)}
        self._write(self.manifest.model_copy(update=chosen))

    def settle_generated(self, fingerprint: str) -> None:
        """Keep of which generated sequences the run is, or see that it is of these.

        Parameters
        ----------
        fingerprint : str
            Of their token ids.

        Raises
        ------
        CheckpointError
            If something is finished that is of others, or the disk is full or refuses.
        """
        begun = self.manifest.generated_fingerprint
        if begun == fingerprint:
            return
        if begun and not self.is_bare:
            raise CheckpointError(
                f"the unfinished run in {self.folder} was begun with other generated sequences; go "
                "on where, and with the --batch-size, it was begun, or delete it"
            )
        self._write(self.manifest.model_copy(update={"generated_fingerprint": fingerprint}))

    def _write(self, manifest: RunManifest) -> None:
        """Let another manifest count."""
        if processes.is_first():
            write_durably(self.folder, MANIFEST, sealed(manifest))
        self.manifest = manifest
        processes.wait()

    def drop_profile(self) -> None:
        """Delete the profile, where factors are not made from it.

        Raises
        ------
        CheckpointError
            If the disk refuses.
        """
        processes.wait()  # until nobody reads it
        try:
            if processes.is_first() and self.profile.exists():
                shutil.rmtree(self.profile)
        except OSError as error:
            raise CheckpointError(f"cannot remove {self.profile}: {error.strerror}") from error

    def save(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        linears: Sequence[LinearReport],
        block: BlockReport | None = None,
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
        block : BlockReport, optional
            Of a sequential run.
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
        text = ""
        if processes.is_first():  # it counts, also if another process has died meanwhile
            entry = write_finished(self.folder, index, tensors, linears, block, warnings)
            self.finished.append(entry)
            text = entry.model_dump_json() if processes.count() > 1 else ""
        text, _ = processes.hand_round(text)
        if not processes.is_first():
            self.finished.append(FinishedBlock.model_validate_json(text))

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
        if not processes.is_first():
            return
        backwards = [name for entry in reversed(self.finished) for name in files_of(entry)]
        try:
            remove_state_folder(self.folder, MANIFEST, backwards)
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
