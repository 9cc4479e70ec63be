"""A folder under a passing name until it is finished."""

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
def renamed_when_done(out: Path) -> Iterator[Path]:
    """Give a passing folder; rename it at the end, or remove it whatever happened.

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
    try:
        folder.chmod(0o755)
        yield folder
        if out.exists():
            raise CheckpointError(f"{out} appeared meanwhile; nothing was written")
        folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {out}: {error}; nothing was kept") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
