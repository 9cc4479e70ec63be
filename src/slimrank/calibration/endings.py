"""Children of a block that give just what one of their linears gave: they need not run whole.

An attention ends in its output projection, an MLP in its last linear. Once such a child has nothing
left to solve, what arrived at that linear tells all of its output. That the child ends so is not
guessed from its name: its output must be the very tensor that the linear gave, and not written to.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ending:
    """The linear that a child of a block ends in.

    Parameters
    ----------
    linear : str
        Name within the block.
    items : int
        Length of the tuple that the child returns, nothing in it behind the first; 0 if it returns
        the tensor itself.
    """

    linear: str
    items: int


def leading_tensor(output: Any) -> tuple[Tensor, int] | None:
    """What a module returned if it is one tensor, and the length of the tuple that it begins.

    Examples
    --------
    >>> import torch
    >>> leading_tensor((torch.zeros(2), None)), leading_tensor((torch.zeros(2), 1))
    ((tensor([0., 0.]), 2), None)
    """
    if isinstance(output, Tensor):
        return output, 0
    if not isinstance(output, tuple) or any(item is not None for item in output[1:]):
        return None
    return (output[0], len(output)) if output and isinstance(output[0], Tensor) else None


@contextmanager
def noting_endings(
    block: nn.Module, linears: Collection[str], endings: dict[str, Ending | None]
) -> Iterator[None]:
    """Note what the children of a block end in, while it runs once.

    Parameters
    ----------
    block : nn.Module
    linears : collection of str
        Names within the block.
    endings : dict of str to (Ending or None)
        By child; None once it ended in no linear, or in another than before, or ran twice.
    """
    given: list[tuple[str, ReferenceType[Tensor], int]] = []
    called: set[str] = set()

    def after_linear(name: str, output: Tensor) -> None:
        given[:] = [] if output.is_inference() else [(name, ref(output), output._version)]

    def after_child(child: str, output: Any) -> None:
        found, led = None, leading_tensor(output)
        for name, tensor, version in given:
            is_own = name.startswith(f"{child}.")
            if is_own and led and led[0] is tensor() and led[0]._version == version:
                found = Ending(name, led[1])
        if child in called or endings.setdefault(child, found) != found:
            endings[child] = None
        called.add(child)

    with ExitStack() as stack:
        for names, note in ((linears, after_linear), (_children(linears), after_child)):
            for name in names:

                def hook(
                    _m: nn.Module,
                    _a: Any,
                    output: Any,
                    name: str = name,
                    note: Callable[[str, Any], None] = note,
                ) -> None:
                    note(name, output)

                handle = block.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
        yield


def _children(linears: Collection[str]) -> set[str]:
    return {name.partition(".")[0] for name in linears if "." in name}
