"""What arrives at linears, given to whoever asks while a module runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from slimrank.errors import NumericalError

Taker = Callable[[Tensor], None]


@contextmanager
def taking_inputs(root: nn.Module, takers: Mapping[str, Taker]) -> Iterator[None]:
    """Give the inputs of each named linear to its taker; remove nothing but these hooks.

    Parameters
    ----------
    root : nn.Module
    takers : mapping of str to callable
        By the linear's name within `root`.

    Examples
    --------
    >>> import torch
    >>> root = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    >>> with taking_inputs(root, {"1": lambda inputs: print(tuple(inputs.shape))}):
    ...     _ = root(torch.zeros(5, 2))
    (5, 3)
    """
    with ExitStack() as stack:
        for name, take in takers.items():
            handle = root.get_submodule(name).register_forward_pre_hook(_giving_to(take))
            stack.callback(handle.remove)
        yield


def _giving_to(take: Taker) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_m: nn.Module, args: tuple[Any, ...]) -> None:
        take(args[0])

    return hook


@contextmanager
def inputs_of(name: str) -> Iterator[None]:
    """Say whose inputs an error of the sums is about.

    Examples
    --------
    >>> with inputs_of("fc1"):
    ...     raise NumericalError("1 of 4 activations are NaN")
    Traceback (most recent call last):
    slimrank.errors.NumericalError: the inputs of fc1: 1 of 4 activations are NaN
    """
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"the inputs of {name}: {error}") from error
