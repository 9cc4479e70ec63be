"""Every error and warning that a caller may catch.

Each type means one thing that can be acted on. The message says what happened, where, and what to
do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1500  # of a message, in characters


def in_one_line(text: str) -> str:
    """Text that may hold anything, such as names from a file, as one line that is safe to print.

    White space becomes one space; what a terminal would not show is escaped; what is too long loses
    its middle.

    Examples
    --------
    >>> in_one_line("a\\n  b\\x1b[31m")
    'a b\\\\x1b[31m'
    >>> len(in_one_line("x" * 10_000)) <= LONGEST
    True
    """
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"
    if line.isprintable():
        return line
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return in_one_line("".join(escaped))


class SlimrankError(Exception):
    """The root of all errors that slimrank raises on purpose; its message is one line."""

    def __str__(self) -> str:
        return in_one_line(super().__str__())


class RecipeError(SlimrankError, ValueError):
    """The recipe is not valid: unknown key, value out of range, target that matches nothing."""


class BudgetError(SlimrankError, ValueError):
    """No set of ranks meets the budget."""


class TextError(SlimrankError, ValueError):
    """The text is missing, empty, too short, or holds tokens the model does not know."""


class ModelError(SlimrankError, ValueError):
    """The model cannot be read, or is built in a way that slimrank does not support."""


class CheckpointError(SlimrankError, ValueError):
    """A folder does not hold what its configuration promises, or cannot be written."""


class NumericalError(SlimrankError, ArithmeticError):
    """A matrix is not finite, or a factorisation failed; nothing is put in its place."""


class NotPositiveDefiniteError(NumericalError):
    """A second moment has no Cholesky root, even after the last jitter."""


class ProcessError(SlimrankError, RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class SlimrankWarning(UserWarning):
    """The root of all warnings that slimrank gives."""


class NumericalWarning(SlimrankWarning):
    """A factorisation needed help (a jitter), or was fed too little data to be sure of."""


class CoverageWarning(SlimrankWarning):
    """Part of the model stays dense that a user may have expected to shrink."""


class SizeWarning(SlimrankWarning):
    """The result is larger than its budget alone would make it."""


@contextmanager
def extra_needed(said: str, extra: str) -> Iterator[None]:
    """Around the import of a package that an extra of slimrank brings.

    Parameters
    ----------
    said : str
        What needs which package.
    extra : str

    Raises
    ------
    SlimrankError
        If the package is not installed.

    Examples
    --------
    >>> with extra_needed("plots need matplotlib", "analysis"):
    ...     raise ImportError
    Traceback (most recent call last):
    slimrank.errors.SlimrankError: plots need matplotlib: pip install 'slimrank[analysis]'
    """
    try:
        yield
    except ImportError as error:
        raise SlimrankError(f"{said}: pip install 'slimrank[{extra}]'") from error
