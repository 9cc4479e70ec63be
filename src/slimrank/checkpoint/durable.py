"""Files that are there whole or not at all; JSON that tells if a bit of it has changed."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from slimrank.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

LOCK, PASSING = "lock", ".partial"
# what file systems on a network answer if they do not sync folders
NEVER_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


class Frozen(BaseModel):
    """What is sealed: frozen, and of known keys only."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Sealed = TypeVar("Sealed", bound=Frozen)


def sealed(entry: Frozen) -> bytes:
    """JSON of an entry and of its hash. Numbers that are not finite stay what they are."""
    return _with_hash(json.dumps(entry.model_dump()).encode())


def _with_hash(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    return f'{{"sha256": "{digest}", "content": '.encode() + content + b"}\n"


def read_sealed(path: Path, kind: type[Sealed], advice: str) -> Sealed:
    """Read what `sealed` gave, if not a bit of it has changed."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    content = text[len(_with_hash(b"")) - len(b"}\n") : -len(b"}\n")]
    if text != _with_hash(content):
        raise CheckpointError(damaged(path, advice))
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{key}: {first['msg']}"
        if key == "format_version":
            what = f"format version {first['input']}, and this slimrank reads version 1"
        raise CheckpointError(f"{path} is of another slimrank ({what}); {advice}") from error


def damaged(path: Path, advice: str) -> str:
    """Say that a file is not what was written."""
    return f"{path} is damaged: it is not what was written; {advice}"


def write_durably(folder: Path, name: str, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    passing = folder / f"{name}{PASSING}"
    try:
        with passing.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        passing.replace(folder / name)
        sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            passing.unlink()
        raise CheckpointError(
            f"cannot write {folder / name}: {error.strerror}; what was finished before is kept"
        ) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; Windows and some network file systems cannot."""
    if sys.platform != "win32":
        try:
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)
        except OSError as error:
            if error.errno not in NEVER_SYNCED:
                raise


def sync_all(folder: Path, names: Iterable[str] | None = None) -> None:
    """Bring files of a folder to the disk, and then their names.

    If none are named, all files, and those of the folders in it.
    """
    below = list(folder.rglob("*")) if names is None else [folder / name for name in names]
    for path in below:
        if not path.is_dir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    for path in below:
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def give_name(passing: Path, out: Path) -> None:
    """Rename what is whole and synced, and bring its name to the disk.

    That this is refused is no failure: it stands, and a disk keeps the order of changes to names.
    """
    passing.rename(out)
    with suppress(OSError):
        sync_folder(out.parent)


def file_hash(path: Path) -> str:
    """SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_passing(folder: Path) -> None:
    """Remove what a killed process left under passing names."""
    try:
        for path in folder.glob(f"*{PASSING}"):
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def locked(folder: Path, out: Path) -> ExitStack:
    """Keep other processes out until the stack is closed; on Windows nothing does.

    A lock that was deleted while this process waited for it keeps nobody out: it is taken anew.
    """
    stack = ExitStack()
    if sys.platform == "win32":
        return stack
    try:
        while True:
            lock = stack.enter_context((folder / LOCK).open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat()):
                    return stack
            stack.close()
    except OSError as error:
        stack.close()
        if isinstance(error, BlockingIOError | FileNotFoundError):  # it is held; it was removed
            raise CheckpointError(f"another process works on {out}; wait for it") from error
        raise CheckpointError(f"cannot lock {folder}: {error.strerror}") from error
