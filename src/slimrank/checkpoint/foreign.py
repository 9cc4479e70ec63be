"""What transformers lets out, as errors of ours: it raises anything, failed assertions included."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimrank.errors import SlimrankError

LONGEST = 300  # characters of a foreign message
NO_ROOM = (MemoryError, torch.OutOfMemoryError)  # of the machine, not of a file


def reason(error: Exception) -> str:
    """First sentence or so of a foreign error, in one line; its type if it says nothing.

    Examples
    --------
    >>> reason(ValueError("no\\n such file")), reason(AssertionError())
    ('no such file', 'AssertionError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if "Unrecognized configuration class" in text:
        return "it is no causal language model"
    return text[:LONGEST]


@contextmanager
def told_as(kind: type[SlimrankError], what: str) -> Iterator[None]:
    """Around calls of transformers: whatever they raise is of one type.

    Errors of ours keep their words. That memory ran out is left alone.

    Parameters
    ----------
    kind : type
    what : str
        Could not be done; the reason follows it.

    Examples
    --------
    >>> from slimrank.errors import ModelError
    >>> with told_as(ModelError, "cannot load m"):
    ...     raise KeyError
    Traceback (most recent call last):
    slimrank.errors.ModelError: cannot load m: KeyError
    """
    try:
        yield
    except NO_ROOM:
        raise
    except SlimrankError as error:
        if isinstance(error, kind):
            raise
        raise kind(str(error)) from error
    except Exception as error:
        raise kind(f"{what}: {reason(error)}") from error
