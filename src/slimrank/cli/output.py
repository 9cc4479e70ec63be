"""What all commands print alike: errors in one line, progress on stderr, tables."""

import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers.utils import logging as transformers_logging

import slimrank
from slimrank import processes
from slimrank.errors import ProcessError, SlimrankError, SlimrankWarning, in_one_line
from slimrank.report import SizeReport

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

stderr = Console(stderr=True, highlight=False)
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
REPEATS = 5.0  # seconds in which schedulers send SIGTERM again


def friendly(command: Callable[P, R], *, is_shared: bool = False) -> Callable[P, R]:
    """Turn our errors and those of the disk into one line and exit code 1.

    Ctrl-C is one line and exit code 130, SIGTERM one line and 143. Of several processes only the
    first one prints, but for errors; a command that they cannot share ends.

    Parameters
    ----------
    command : callable
    is_shared : bool
        Whether several processes may share it.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings(), _ends_cleanly() as received:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", SlimrankWarning)
            warnings.showwarning = _show_warning
            try:
                with _own_voice(is_shared):
                    return command(*args, **kwargs)
            except SlimrankError as error:
                _say("error", _told_by(str(error)))
            except OSError as error:
                line = f"{error.filename or 'the disk'}: {error.strerror or error}"
                _say("error", _told_by(line))
            except KeyboardInterrupt as error:
                number = received[0] if received else signal.SIGINT
                _say(ENDED[number], _told_by(str(error) or "nothing was kept"))
                raise typer.Exit(128 + number) from None
        raise typer.Exit(1)

    return wrapped


@contextmanager
def _own_voice(is_shared: bool) -> Iterator[None]:
    """Let only the first of several processes speak, and refuse what they cannot share."""
    number, count = processes.to_be()
    if count > 1 and not is_shared:
        raise SlimrankError(
            "only compress and profile can be shared by processes; run this without torchrun"
        )
    if number == 0:
        yield
        return
    stderr.quiet = True
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nobody, redirect_stdout(nobody):
        yield


def _told_by(message: str) -> str:
    """Say which process speaks, if there are several."""
    number, count = processes.to_be()
    return message if count == 1 else f"process {number} of {count}: {message}"


@contextmanager
def says_what_is_kept(how: Callable[[], str | None]) -> Iterator[None]:
    """Around work that can be gone on with: what to say of it if it, or another process, is ended.

    Parameters
    ----------
    how : callable
        Gives one line, or None if nothing is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        line = how()
        raise KeyboardInterrupt(*([] if line is None else [line])) from None
    except ProcessError as error:
        line = how()
        raise ProcessError(str(error) if line is None else f"{error}; {line}") from error


def say_if_it_begins(resume: bool, is_kept: bool) -> None:
    """Say that a run which may go on with an earlier one finds none."""
    if resume and not is_kept and processes.to_be()[0] == 0:
        _say("note", "nothing is kept of an earlier run; this one begins at the start")


def print_json(text: str) -> None:
    """Put a result on stdout."""
    typer.echo(text)


def print_size(size: SizeReport) -> None:
    """Print the budget line."""
    typer.echo(size.line())


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table on stdout; all columns but the first are figures."""
    typer.echo(title)
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(in_one_line(str(cell)) for cell in row))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110).print(table)


def track(steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Walk over steps with a progress bar and the time left, on stderr."""
    items = list(steps) if total is None else steps
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
    ) as progress:
        known = len(items) if isinstance(items, list) else total
        yield from progress.track(items, total=known, description=what)


def role(name: str) -> str:
    """Last part of a linear's name: what tables sum up by."""
    return name.rsplit(".", 1)[-1]


def span(values: Sequence[int]) -> str:
    """Smallest and largest of some whole numbers.

    Examples
    --------
    >>> span([3, 1, 2]), span([4, 4])
    ('1-3', '4')
    """
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def show_version(wanted: bool) -> bool:
    """Print the version and stop, if that is what was asked for."""
    if wanted:
        typer.echo(slimrank.__version__)
        raise typer.Exit
    return wanted


def version_option(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=show_version),
    ] = False,
) -> None:
    """Make a causal language model smaller by activation-aware low-rank factorisation."""
    del version


def _say(kind: str, message: str) -> None:
    typer.echo(f"{kind}: {in_one_line(message)}", err=True)


def _show_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    _say("warning", str(message))


@contextmanager
def _ends_cleanly() -> Iterator[list[signal.Signals]]:
    """Let SIGTERM end a run as Ctrl-C does, so that nothing half-written remains.

    Gives the signals that ended it. A SIGTERM within seconds of one changes nothing: schedulers
    send several.
    """
    received: list[signal.Signals] = []
    last = 0.0

    def interrupt(number: int, _frame: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if number == signal.SIGINT or not received or now - last > REPEATS:
            received.append(signal.Signals(number))
            last = now
            raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # of a job in the background
    numbers = [signal.SIGTERM] if ignored else list(ENDED)
    try:
        before = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: it was set outside of Python, and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
