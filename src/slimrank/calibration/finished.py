"""Children of a block that have nothing left to solve: run once more, then given again."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.calibration.store import ActivationStore, stacked

FINISHED = "finished"


def finished_children(
    block: nn.Module, solved: set[str], pending: set[str]
) -> dict[str, nn.Module]:
    """Children of the block that hold solved linears, and none to be solved.

    Parameters
    ----------
    block : nn.Module
    solved, pending : set of str
        Names of linears within the block.
    """
    inside, outside = ({name.partition(".")[0] for name in names} for names in (solved, pending))
    children = dict(block.named_children())
    return {name: child for name, child in children.items() if name in inside - outside}


@contextmanager
def given_again(
    children: Mapping[str, nn.Module], store: ActivationStore, numbers: list[int], seen: set[str]
) -> Iterator[None]:
    """Let children that are finished give what they gave before; write it down the first time.

    Nothing is written down once an input of this pass was `seen`: it may depend on what follows.

    Parameters
    ----------
    children : mapping of str to nn.Module
    store : ActivationStore
    numbers : list of int
        Sequences that the block is run on meanwhile.
    seen : set of str
    """
    with ExitStack() as stack:
        for name, child in children.items():
            if all((FINISHED, name, number) in store for number in numbers):
                states = stacked(store, (FINISHED, name), numbers)
                extra = store.get((FINISHED, name, "extra", numbers[0]))
                stack.enter_context(_replaced_forward(child, states, int(extra)))
            elif not seen:

                def hook(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                    first, extra = (
                        (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
                    )
                    rest = output[1:] if extra else ()
                    if seen or len(first) != len(numbers) or any(x is not None for x in rest):
                        return
                    for number, states in zip(numbers, first, strict=True):
                        store.put((FINISHED, name, number), states)
                        store.put((FINISHED, name, "extra", number), torch.tensor(extra))

                stack.callback(child.register_forward_hook(hook).remove)
        yield


@contextmanager
def _replaced_forward(child: nn.Module, states: Tensor, items: int) -> Iterator[None]:
    """Let a module return what is given: a tensor, or a tuple that it begins."""
    device = next(child.parameters()).device

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        given = states.to(device)
        return (given, *[None] * (items - 1)) if items else given

    own = child.__dict__.get("forward")
    child.forward = forward
    try:
        yield
    finally:
        del child.forward
        if own is not None:
            child.forward = own
