"""What holds of every reader, whatever a file holds: a right result, or one line that says why."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from slimrank.cli import app
from slimrank.environment import peak_bytes
from slimrank.errors import LONGEST, SlimrankError

T = TypeVar("T")
MOST_BYTES = 64_000_000  # the tiny models and profiles take less than one million
NO_MEMORY = ("allocate", "memory", "storage size", "overflow")


def examples(number: int) -> Callable[[T], T]:
    """Settings of a fuzz test: the same examples in every run, and nothing kept."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Allocations(TorchDispatchMode):
    """Watches what is made of tensors off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        try:
            result = function(*args, **(kwargs or {}))
        except RuntimeError as error:
            if any(word in str(error) for word in NO_MEMORY):
                self.largest = 2**63
            raise
        made = result if isinstance(result, (tuple, list)) else (result,)
        for tensor in made:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@contextmanager
def bounded() -> Iterator[None]:
    """Nothing of a hostile size is made."""
    before = peak_bytes()
    with warnings.catch_warnings(), Allocations() as made:
        warnings.simplefilter("ignore")
        yield
    assert made.largest <= MOST_BYTES
    assert peak_bytes() - before <= 2 * MOST_BYTES


def right_or_refused(call: Callable[[], T], *names: object) -> T | None:
    """Call a reader; if it refuses, in one line that can be printed and names the file."""
    with bounded():
        try:
            return call()
        except SlimrankError as error:
            require_one_line(str(error), names)
            return None


def require_one_line(line: str, names: tuple[object, ...] = ()) -> None:
    """A message that can be printed, and says one of the names, if there are any."""
    assert any(str(name) in line for name in names or (" ",)), line
    assert line.isprintable(), line
    assert len(line) <= LONGEST + 20


def run(*arguments: object) -> str:
    """Run a command: exit code 0, or 1 and one line. What it says."""
    with bounded():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(errors)) in ((0, 0), (1, 1)), result.output
    assert "Traceback" not in result.output
    return str(result.output)


def around(folder: Path) -> dict[str, tuple[int, int]]:
    """All that lies beside a folder: names, sizes, times of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.parent.rglob("*")
        if folder not in (path, *path.parents)
    }


@contextmanager
def nothing_else_touched(folder: Path) -> Iterator[None]:
    """Only what is in a folder may change."""
    before = around(folder)
    yield
    assert around(folder) == before


def put_back(folder: Path, files: dict[str, bytes]) -> None:
    """Make the files of a folder what they were."""
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
