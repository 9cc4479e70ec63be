"""A folder, or a file, under a passing name until it is finished."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slimrank.errors import CheckpointError


def require_writable(out: Path) -> None:
    """See that a folder can be made, before any work.

    Raises
    ------
    CheckpointError
        If it exists already, or its parent cannot be written to.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; name a folder that does not")
    parent = next(p for p in out.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".slimrank-", dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write to {parent}: {error.strerror}") from error


@contextmanager
def renamed_when_done(out: Path, *, is_file: bool = False) -> Iterator[Path]:
    """Give a passing name; rename what is there at the end, or remove it whatever happened.

    Parameters
    ----------
    out : Path
    is_file : bool
        The name is free for a file, with the ending of `out`; otherwise it is an empty folder.

    Raises
    ------
    CheckpointError
        If the disk is full or refuses, or `out` has appeared meanwhile.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    passing = folder / f"file{out.suffix}" if is_file else folder
    try:
        folder.chmod(0o755)
        yield passing
        if out.exists():
            raise CheckpointError(f"{out} appeared meanwhile; nothing was written")
        passing.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {out}: {error}; nothing was kept") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
