"""A folder, or a file, under a passing name until it is finished."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slimrank.checkpoint.durable import give_name, sync_all
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
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write to {parent}: {error.strerror}") from error


@contextmanager
def renamed_when_done(
    out: Path, *, is_file: bool = False, beside: Path | None = None
) -> Iterator[Path]:
    """Give a passing name; sync and rename what is there at the end, or remove it in any case.

    Parameters
    ----------
    out : Path
    is_file : bool
        The name is free for a file, with the ending of `out`; otherwise it is an empty folder.
    beside : Path, optional
        Folder to pass in, on the same disk, which is kept for a resumed run; that of `out` if left
        out.

    Raises
    ------
    CheckpointError
        If the disk is full or refuses, or `out` has appeared meanwhile.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=beside or out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    passing = folder / f"file{out.suffix}" if is_file else folder
    try:
        folder.chmod(0o755)
        yield passing
        sync_all(folder)
        if out.exists():
            raise CheckpointError(f"{out} appeared meanwhile; nothing was written")
        give_name(passing, out)
    except (OSError, SafetensorError) as error:
        kept = "nothing was kept" if beside is None else "what is finished is kept: see --resume"
        raise CheckpointError(f"cannot write {out}: {error}; {kept}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
