"""The folder beside an output in which what is unfinished is kept: begun, and removed."""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from slimrank.checkpoint.durable import LOCK, Sealed, locked, read_sealed, sync_folder
from slimrank.errors import CheckpointError

UNFINISHED = ".unfinished"


def state_folder(out: Path) -> Path:
    """Name the folder in which an unfinished run is kept.

    Examples
    --------
    >>> state_folder(Path("models/small")).as_posix()
    'models/.small.unfinished'
    """
    return out.parent / f".{out.name}{UNFINISHED}"


@contextmanager
def new_state_folder(out: Path) -> Iterator[ExitStack]:
    """Make the folder and give its lock; if what follows fails, an empty one does not stay.

    Parameters
    ----------
    out : Path
        The folder is `state_folder` of it.

    Raises
    ------
    CheckpointError
        If another process works on it, or the disk refuses.
    """
    folder = state_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        with locked(folder, out) as lock:
            try:
                yield lock
            except CheckpointError:
                _remove_if_empty(folder)
                raise
    except (CheckpointError, OSError) as error:
        with suppress(OSError):  # it holds something, or is gone
            folder.rmdir()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error


def _remove_if_empty(folder: Path) -> None:
    """Remove empty folders in it, and the lock if that is all that is left."""
    for path in folder.iterdir():
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()


def remove_passing_folders(folder: Path) -> None:
    """Remove what a killed process left of folders; not an unfinished profile.

    Raises
    ------
    CheckpointError
        If the disk refuses.
    """
    try:
        for path in folder.glob(".*"):
            if path.is_dir() and path.suffix != UNFINISHED:
                shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def remove_state_folder(folder: Path, manifest: str, first: Sequence[str] = ()) -> None:
    """Delete a state whose lock is held; cut off in between, what is left is told for what it is.

    Parameters
    ----------
    folder : Path
    manifest : str
        Name of the file that goes last but for the lock.
    first : sequence of str
        Names of files that go before all others, in this order.

    Raises
    ------
    CheckpointError
        If the disk refuses.
    """
    try:
        for name in first:
            (folder / name).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (manifest, LOCK):
                path.unlink()
        (folder / manifest).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY and not (folder / manifest).exists():
            return  # another process, which waited for the lock, begins in it
        raise CheckpointError(
            f"cannot remove {folder}: {error.strerror}; delete it by hand"
        ) from error


@dataclass(frozen=True)
class Unfinished(Generic[Sealed]):
    """What can be unfinished beside an output: a run, a profile or a healing.

    Parameters
    ----------
    word : str
        It is called in errors.
    file : str
        Name of its manifest.
    manifest : type
        What that holds.
    """

    word: str
    file: str
    manifest: type[Sealed]

    def is_kept(self, out: Path) -> bool:
        """Tell whether one is kept for a folder."""
        return (state_folder(out) / self.file).exists()

    def require_none(self, out: Path) -> None:
        """See that none is in the way, before any work.

        Raises
        ------
        CheckpointError
            If there is one.
        """
        if self.is_kept(out):
            raise CheckpointError(
                f"an unfinished {self.word} is in {state_folder(out)}; go on with --resume, or "
                "delete it"
            )

    def read(self, out: Path) -> Sealed:
        """Read the manifest of the one that is kept.

        Raises
        ------
        CheckpointError
            If it is missing, damaged or of another version.
        """
        folder = state_folder(out)
        return read_sealed(folder / self.file, self.manifest, f"delete {folder}")

    def removed_what_is_left(self, out: Path, is_same: Callable[[Sealed], bool]) -> bool:
        """Remove the state of one whose output stands; tell whether there was one.

        A process that is killed between the last two steps, name and removal, leaves both.

        Parameters
        ----------
        out : Path
            Known to stand.
        is_same : callable
            Tells of a manifest whether it is of what the output was made by. It is not asked if the
            manifest is gone, and nothing else is left.

        Raises
        ------
        CheckpointError
            If another process works on it, the state is damaged, or the disk refuses.
        """
        folder = state_folder(out)
        if not folder.is_dir():
            return False
        with locked(folder, out):
            if self.is_kept(out):
                if not is_same(self.read(out)):
                    return False
            elif any(path.name != LOCK for path in folder.iterdir()):
                return False
            remove_state_folder(folder, self.file)
        return True
