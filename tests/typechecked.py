"""The type checker of tests: beartype, at no cost for functions within functions."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_known: dict[Any, Any] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let beartype check calls of a function.

    jaxtyping hands in functions that have nothing but a signature, anew whenever a definition is
    passed. Within functions that is often, and takes milliseconds; alike ones are checked alike.
    """
    is_within = "<locals>" in function.__qualname__
    if not is_within or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    hints = tuple(function.__annotations__.items())
    key = (function.__module__, function.__qualname__, function.__code__, hints)
    try:
        hash(key)
    except TypeError:  # `P.args` of a decorator
        return beartype(function)
    if key not in _known:
        _known[key] = beartype(function)
    return _known[key]
