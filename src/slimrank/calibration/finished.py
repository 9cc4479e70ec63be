"""Children of a block that have nothing left to solve: run once more, then given again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.calibration.endings import Ending, leading_tensor
from slimrank.calibration.store import ActivationStore, stacked, together

FINISHED, HELD = "finished", "held"


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
    children: Mapping[str, nn.Module],
    endings: Mapping[str, Ending],
    store: ActivationStore,
    numbers: list[int],
    seen: set[str],
) -> Iterator[None]:
    """Let children that are finished give what they gave before; write it down the first time.

    A child that ends in a linear whose inputs are held takes them through that linear, and runs
    nothing else. Nothing is written down once an input of this pass was `seen`: it may depend on
    what follows.

    Parameters
    ----------
    children : mapping of str to nn.Module
    endings : mapping of str to Ending
        By child.
    store : ActivationStore
        Holds outputs under ``("finished", child, number)``, and the inputs of a linear that a child
        ends in under ``("held", linear, number)``; these are let go when they are used.
    numbers : list of int
        Sequences that the block is run on meanwhile.
    seen : set of str
    """
    with ExitStack() as stack:
        for name, child in children.items():
            again = _Again(name, child, endings.get(name), store, numbers, seen)
            if again.is_known:
                stack.enter_context(_replaced(child, again.known))
            elif again.is_held:
                stack.enter_context(_replaced(child, again.ended))
            elif not seen:
                hook = child.register_forward_hook(again.after)
                stack.callback(hook.remove)
        yield


@dataclass(frozen=True, slots=True)
class _Again:
    """What one child gives for some sequences."""

    name: str
    child: nn.Module
    ending: Ending | None
    store: ActivationStore
    numbers: list[int]
    seen: set[str]

    @property
    def is_known(self) -> bool:
        return all((FINISHED, self.name, number) in self.store for number in self.numbers)

    @property
    def is_held(self) -> bool:
        if self.ending is None:
            return False
        return all((HELD, self.ending.linear, number) in self.store for number in self.numbers)

    def known(self) -> Any:
        """What it gave before."""
        items = self.store.get((FINISHED, self.name, "items", self.numbers[0]))
        states = stacked(self.store, (FINISHED, self.name), self.numbers)
        return _returned(states.to(self._device), int(items))

    def ended(self) -> Any:
        """What its last linear gives."""
        assert self.ending is not None
        linear = self.child.get_submodule(self.ending.linear.removeprefix(f"{self.name}."))
        held = together(self.store, (HELD, self.ending.linear), self.numbers)
        output = _returned(linear(held.to(self._device)), self.ending.items)
        self.after(self.child, (), output)
        for number in self.numbers:
            self.store.drop((HELD, self.ending.linear, number))
        return output

    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Write down what it gave."""
        led = leading_tensor(output)
        if self.seen or led is None or len(led[0]) != len(self.numbers):
            return
        self.store.put_rows((FINISHED, self.name), self.numbers, led[0])
        for number in self.numbers:
            self.store.put((FINISHED, self.name, "items", number), torch.tensor(led[1]))

    @property
    def _device(self) -> torch.device:
        return next(self.child.parameters()).device


def _returned(states: Tensor, items: int) -> Any:
    """A tensor, or the tuple that it begins."""
    return (states, *[None] * (items - 1)) if items else states


@contextmanager
def _replaced(child: nn.Module, give: Callable[[], Any]) -> Iterator[None]:
    """Let a module return what is given."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return give()

    own = child.__dict__.get("forward")
    child.forward = forward
    try:
        yield
    finally:
        del child.forward
        if own is not None:
            child.forward = own
