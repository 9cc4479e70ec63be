"""Blocks that stay in their files come to a device in turns, and leave it again.

Without a device there is nothing to bring: a mapped weight is read where it is used. With one, a
block is copied there when it is about to run. What lies outside the blocks is there for good.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimrank.model.mapped import HOME, SHARED, let_go_of, trim

PLACE, STAYS = "_runs_on", "_stays"


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: the device of its first parameter, or the one that it comes to in turn.

    Examples
    --------
    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    place: torch.device | None = module.__dict__.get(PLACE)
    if place is not None:
        return place
    parameter: Tensor = next(module.parameters())
    return parameter.device


def run_on(model: nn.Module, blocks: Iterable[nn.Module], device: str | torch.device) -> None:
    """Let the blocks of a mapped model run on a device; take there what lies outside them.

    Parameters
    ----------
    model : nn.Module
    blocks : iterable of nn.Module
    device : str or torch.device
    """
    place = torch.device(device)
    if place.type == "cpu":
        return
    inside: set[nn.Module] = set()
    for block in blocks:
        inside |= set(block.modules())
    for module in inside:
        module.__dict__[PLACE] = place

    def moved(parameter: nn.Parameter) -> nn.Parameter:
        there = _on(parameter, place)
        setattr(there, SHARED, True)
        let_go_of((parameter,))
        return there

    _move_buffers(model.modules(), place)
    _exchange((module for module in model.modules() if module not in inside), moved)


def take_turns(parts: Iterable[nn.Module]) -> None:
    """Bring a part when it begins to run, and let go of the one that ran last.

    Batch after batch reads a part once. Copies of the model take turns with it: a function is not
    copied, and what it holds is weak.
    """
    ran: list[weakref.ref[nn.Module]] = []

    def begin(part: nn.Module, _: object) -> None:
        last = ran.pop()() if ran else None
        ran.append(weakref.ref(part))
        if last is not None and last is not part and not last.__dict__.get(STAYS):
            let_go(last)
        if "forward" not in part.__dict__:  # one that another function stands in for
            _bring(part)

    for part in parts:
        part.register_forward_pre_hook(begin)


@contextmanager
def staying(part: nn.Module) -> Iterator[None]:
    """Keep a part on its device whatever runs in between, as it must be while it is trained."""
    before = part.__dict__.get(STAYS, False)
    part.__dict__[STAYS] = True
    _bring(part)
    try:
        yield
    finally:
        part.__dict__[STAYS] = before


def let_go(module: nn.Module) -> None:
    """Give back the memory that mapped weights of a module take; they are read again when touched.

    Weights that are not mapped, or were written to since, stay as they are; those of a block that
    runs on a device leave it.
    """
    leaves = PLACE in module.__dict__

    def left(parameter: nn.Parameter) -> nn.Parameter:
        return _home_of(parameter, leaves) if leaves or hasattr(parameter, HOME) else parameter

    _exchange(module.modules(), left)
    if let_go_of(module.parameters()):
        trim()


def _bring(part: nn.Module) -> None:
    """Copy what is on the CPU to where the part runs."""
    place: torch.device | None = part.__dict__.get(PLACE)
    if place is None:
        return
    destination = place

    def brought(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device.type != "cpu":
            return parameter
        there = _on(parameter, destination)
        setattr(there, HOME, (parameter, there._version, there.data_ptr()))
        return there

    _move_buffers(part.modules(), place)
    _exchange(part.modules(), brought)


def _exchange(
    modules: Iterable[nn.Module], instead: Callable[[nn.Parameter], nn.Parameter]
) -> None:
    """Put what a function gives in the place of each parameter; a tied one stays tied."""
    known: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                known[id(parameter)] = instead(parameter)
            module._parameters[name] = known[id(parameter)]


def _home_of(parameter: nn.Parameter, leaves: bool) -> nn.Parameter:
    """What a parameter is a copy of; if it was written to, a copy of itself on the CPU."""
    home, *then = getattr(parameter, HOME, (None,))
    if isinstance(home, nn.Parameter) and then == [parameter._version, parameter.data_ptr()]:
        home.requires_grad_(parameter.requires_grad)
        return home
    return _on(parameter, torch.device("cpu")) if leaves else parameter


def _on(parameter: nn.Parameter, place: torch.device) -> nn.Parameter:
    if parameter.device.type == place.type:
        return parameter
    with torch.inference_mode(False):  # it may be trained later, and is to count what is written
        return nn.Parameter(parameter.detach().to(place), parameter.requires_grad)


def _move_buffers(modules: Iterable[nn.Module], place: torch.device) -> None:
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(place)
