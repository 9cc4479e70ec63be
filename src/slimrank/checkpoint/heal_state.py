"""How far a healing has come, kept beside its output so that one that was cut off can go on.

The folder holds a manifest, and the last snapshot: tensors, and then the entry without which they
do not count. The one before goes once the next one counts.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slimrank.checkpoint.durable import (
    LOCK,
    Frozen,
    damaged,
    file_hash,
    locked,
    read_sealed,
    remove_passing,
    sealed,
    sync_all,
    write_durably,
)
from slimrank.checkpoint.manifest import require_same
from slimrank.checkpoint.profile import write_tensors
from slimrank.checkpoint.unfinished import (
    Unfinished,
    new_state_folder,
    remove_passing_folders,
    remove_state_folder,
    state_folder,
)
from slimrank.errors import CheckpointError, NumericalError
from slimrank.report import HealCheck

MANIFEST = "heal-run.json"


class HealRun(Frozen):
    """What an unfinished healing is of; a resumed one must be of the same.

    Parameters
    ----------
    marks : dict of str to str
        Fingerprints by what they are of: settings, folder, dense model, text.
    versions : dict of str to str
        As in `RunManifest`.
    """

    format_version: Literal[1] = 1
    marks: dict[str, str]
    versions: dict[str, str]


class HealSnapshot(Frozen):
    """Where it stood.

    Parameters
    ----------
    step : int
        Steps that were taken.
    best_step : int
        After which the held-out loss was best.
    checks : tuple of HealCheck
        So far.
    sha256 : str
        Of the file of the tensors.
    """

    step: int
    best_step: int
    checks: tuple[HealCheck, ...]
    sha256: str = ""


UNFINISHED_HEALING = Unfinished("healing", MANIFEST, HealRun)


def removed_what_is_left(out: Path, settings: str) -> bool:
    """Remove the state of a healing whose folder stands; tell whether there was one.

    Parameters
    ----------
    out : Path
    settings : str
        Fingerprint of the settings that the folder was made by.

    Raises
    ------
    CheckpointError
        If another process works on it, the state is damaged, or the disk refuses.
    """
    return UNFINISHED_HEALING.removed_what_is_left(
        out, lambda begun: begun.marks.get("settings") == settings
    )


@final
@dataclass(slots=True, eq=False)
class HealState:
    """What is kept of a healing, open to one process at a time. Made by `begin` or `resume`.

    As a context manager it lets other processes in again at the end; and if an error comes before
    anything is kept, or is one that would come again, it removes what there is.

    Parameters
    ----------
    folder : Path
    manifest : HealRun
    last : HealSnapshot or None
    """

    folder: Path
    manifest: HealRun
    last: HealSnapshot | None
    _lock: ExitStack

    @classmethod
    def begin(cls, out: Path, manifest: HealRun) -> "HealState":
        """Make the folder of a new one.

        Raises
        ------
        CheckpointError
            If there is an unfinished one, another process works on it, or the disk refuses.
        """
        folder = state_folder(out)
        with new_state_folder(out) as lock:
            UNFINISHED_HEALING.require_none(out)
            remove_passing(folder)
            if any(path.name != LOCK for path in folder.iterdir()):
                raise CheckpointError(f"{folder} holds files but no {MANIFEST}; delete it")
            write_durably(folder, MANIFEST, sealed(manifest))
            return cls(folder, manifest, None, lock.pop_all())

    @classmethod
    def resume(cls, out: Path) -> "HealState":
        """Open what one that was cut off has left, and check it.

        Raises
        ------
        CheckpointError
            If another process works on it, or a file is missing or damaged.
        """
        folder = state_folder(out)
        with locked(folder, out) as lock:
            manifest = UNFINISHED_HEALING.read(out)
            remove_passing(folder)
            remove_passing_folders(folder)
            last = _read_last(folder)
            _remove_others(folder, last)
            return cls(folder, manifest, last, lock.pop_all())

    def require(self, marks: Mapping[str, str]) -> None:
        """See that what is to go on is what was begun.

        Raises
        ------
        CheckpointError
            With all that differs, in one line.
        """
        require_same(self.folder, "healing", self.manifest.marks, marks)

    def save(self, snapshot: HealSnapshot, tensors: dict[str, Tensor]) -> None:
        """Keep a snapshot in the place of the one before. It counts once this returns.

        Raises
        ------
        CheckpointError
            If the disk is full or refuses.
        """
        name = _tensors_file(snapshot.step)
        try:
            digest = write_tensors(self.folder, name, tensors)[name]
            sync_all(self.folder, (name,))
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                (self.folder / name).unlink()
            raise CheckpointError(
                f"cannot write {self.folder / name}: {error}; what was kept before stays"
            ) from error
        snapshot = snapshot.model_copy(update={"sha256": digest})
        write_durably(self.folder, _entry_file(snapshot.step), sealed(snapshot))
        self.last = snapshot
        _remove_others(self.folder, snapshot)

    def tensors(self) -> dict[str, Tensor]:
        """Read those of the last snapshot, on the CPU and bit for bit as they were saved."""
        assert self.last is not None
        found: dict[str, Tensor] = load_file(self.folder / _tensors_file(self.last.step))
        return found

    def remove(self) -> None:
        """Delete the folder, and let go of it.

        Raises
        ------
        CheckpointError
            If the disk refuses.
        """
        try:
            remove_state_folder(self.folder, MANIFEST)
        finally:
            self.close()

    def close(self) -> None:
        """Let other processes at the folder. May be called twice."""
        self._lock.close()

    def __enter__(self) -> "HealState":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, NumericalError) or (error is not None and self.last is None):
                with suppress(CheckpointError):  # as much as the disk lets go of
                    remove_state_folder(self.folder, MANIFEST)
        finally:
            self.close()


def _read_last(folder: Path) -> HealSnapshot | None:
    """Read the last snapshot that counts, and check the file of its tensors."""
    entries = sorted(folder.glob("step-*.json"))
    if not entries:
        return None
    advice = f"delete {folder}"
    snapshot = read_sealed(entries[-1], HealSnapshot, advice)
    path = folder / _tensors_file(snapshot.step)
    if entries[-1].name != _entry_file(snapshot.step) or not snapshot.checks:
        raise CheckpointError(damaged(entries[-1], advice))
    try:
        digest = file_hash(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {advice}") from error
    if digest != snapshot.sha256:
        raise CheckpointError(damaged(path, advice))
    return snapshot


def _remove_others(folder: Path, last: HealSnapshot | None) -> None:
    """Remove other snapshots: entries first, so that none of them counts without its tensors."""
    kept = () if last is None else (_tensors_file(last.step), _entry_file(last.step))
    try:
        for ending in ("json", "safetensors"):
            for path in folder.glob(f"step-*.{ending}"):
                if path.name not in kept:
                    path.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def _entry_file(step: int) -> str:
    return f"step-{step:09d}.json"


def _tensors_file(step: int) -> str:
    return f"step-{step:09d}.safetensors"
