"""A disk that is full from some moment on, and a process that dies at one."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

WRITES = {"builtins.open": "open", "io.open": "open", "os.mkdir": "path", "os.fsync": "any"}
CHANGES = {"os.unlink": "path", "os.rename": "path", "os.replace": "path", "os.rmdir": "path"}


class Killed(BaseException):
    """Nothing that the process would do after it happens: every further step raises it too."""


@contextmanager
def full_disk(root: Path, after: int | None) -> Iterator[list[str]]:
    """Let what is written below `root` fail for want of room once `after` steps have succeeded.

    A step opens a file to write, makes a folder, syncs, or writes tensors. Gives what was done;
    with None, nothing fails.
    """

    def fail(kind: str) -> None:
        if kind == "tensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _failing(root, after, WRITES, fail) as done:
        yield done


@contextmanager
def killed(root: Path, after: int | None) -> Iterator[list[str]]:
    """Let a process die below `root` once `after` steps are done; nothing is cleaned up."""

    def fail(_kind: str) -> None:
        raise Killed

    with _failing(root, after, WRITES | CHANGES, fail) as done:
        yield done


@contextmanager
def _failing(
    root: Path, after: int | None, calls: dict[str, str], fail: Callable[[str], None]
) -> Iterator[list[str]]:
    done: list[str] = []

    def step(kind: str) -> None:
        if after is not None and len(done) >= after:
            fail(kind)
        done.append(kind)

    def counted(name: str, how: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            mode = named.get("mode", arguments[1] if len(arguments) > 1 else "r")
            is_read = how == "open" and not (isinstance(mode, str) and set(mode) & set("wax+"))
            if not is_read and (how == "any" or _is_below(root, arguments[0], named)):
                step(name)
            return real(*arguments, **named)

        return call

    write = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        if _is_below(root, path, named):
            if after is not None and len(done) >= after:
                _tear(path)
            step("tensors")
        write(tensors, path, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name, how in calls.items():
            real = io.open if how == "open" else getattr(os, name.removeprefix("os."))
            patch.setattr(name, counted(name, how, real))
        patch.setattr(safetensors.torch, "serialize_file", serialize_file)
        yield done


def _tear(path: Any) -> None:
    """Leave a file that was cut off while it was written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"torn")
    os.close(descriptor)


def _is_below(root: Path, path: Any, named: dict[str, Any]) -> bool:
    if named.get("dir_fd") is not None:
        return True
    if not isinstance(path, str | os.PathLike):
        return False
    return os.fspath(path).startswith(str(root))
