"""One block and its compressed twin, on the same tokens: what arrives at each of their linears.

The original block takes its stream once, and all inputs of its linears are kept. The compressed
one goes from group to group in call order: each pass stops in front of the next linears that are
not solved yet, so every moment includes what was replaced before. A child of the block whose
linears are all solved runs once more at most; its outputs are kept and given again. Together that
is less than three forwards a stream; the authors' code takes ten.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.calibration.finished import FINISHED, finished_children, given_again
from slimrank.calibration.store import stacked
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams
from slimrank.calibration.sums import BlockErrorSums, GroupSums, OutputEnergy
from slimrank.errors import ModelError, NumericalError
from slimrank.model import InputGroup
from slimrank.report import BlockError

TARGET, INPUT, ARRIVED, NEXT = "target", "input", "arrived", "next"


class _StopForward(Exception):
    """All inputs that a pass is for have been seen."""


@dataclass(frozen=True, slots=True)
class BlockPair:
    """A block that stays as it is, and the one that is being compressed.

    Parameters
    ----------
    index : int
    path : str
        Dotted name of the block in the model.
    original, compressed : nn.Module
    """

    index: int
    path: str
    original: nn.Module
    compressed: nn.Module

    def local(self, name: str) -> str:
        """Name of a linear within the block."""
        return name.removeprefix(f"{self.path}.")


@dataclass(slots=True)
class OriginalPass:
    """What the original block showed.

    Parameters
    ----------
    sums : dict of str to GroupSums
        By the group's first linear; for methods that look at the original stream only.
    energies : dict of str to float
        Mean of ``‖W x‖²`` for each linear; for methods that look at both.
    """

    sums: dict[str, GroupSums] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def pass_original(
    pair: BlockPair, groups: Sequence[InputGroup], needs: frozenset[str], streams: Streams
) -> OriginalPass:
    """Take the original stream through the original block, once.

    Its outputs are kept under ``("target", number)``; with `needs` of both streams, or for the last
    calibration sequence, so are the inputs of each group.

    Parameters
    ----------
    pair : BlockPair
    groups : sequence of InputGroup
    needs : frozenset of str
    streams : Streams

    Raises
    ------
    NumericalError
        If an activation is not finite.
    ModelError
        If `needs` is of both streams and the inputs of a linear are not one a token (experts):
        those of one stream cannot be told from the other's.
    """
    device = next(pair.original.parameters()).device
    found = OriginalPass()
    outputs: dict[str, OutputEnergy] = {}
    if needs == {"original"}:
        found.sums = {g.sites[0].name: GroupSums(g, needs, device) for g in groups}
    if needs == {"original", "shifted"}:
        outputs = {
            s.name: OutputEnergy(pair.original, pair.local(s.name)) for g in groups for s in g.sites
        }
    last = streams.num_calibration - 1
    for numbers in streams.walk():
        is_last = numbers == [last]
        takers: dict[str, Callable[[Tensor], None]] = {}
        for group in groups if numbers[0] <= last and "original" in needs else ():
            name = group.sites[0].name
            takers[pair.local(name)] = _original_taker(
                name, needs, found.sums.get(name), streams, numbers, is_last
            )
        with _before(pair.original, takers), ExitStack() as stack:
            for energy in outputs.values() if numbers[0] <= last else ():
                stack.enter_context(energy.listening())
            hidden = _run(pair.original, pair.index, streams, ORIGINAL, numbers)
        for number, states in zip(numbers, hidden, strict=True):
            streams.store.put((TARGET, number), states)
    found.energies = {name: energy.mean for name, energy in outputs.items()}
    return found


@torch.no_grad()
def pass_level(
    pair: BlockPair,
    level: Sequence[InputGroup],
    solved: Sequence[str],
    pending: Sequence[str],
    needs: frozenset[str],
    streams: Streams,
) -> dict[str, GroupSums]:
    """Take the shifted stream up to the linears of one level, and sum their moments.

    Parameters
    ----------
    pair : BlockPair
    level : sequence of InputGroup
        Groups that do not depend on one another.
    solved, pending : sequence of str
        Linears of the block that are replaced already, and those that are to be.
    needs : frozenset of str
    streams : Streams

    Returns
    -------
    dict of str to GroupSums
        By the group's first linear.
    """
    device = next(pair.compressed.parameters()).device
    sums = {g.sites[0].name: GroupSums(g, needs, device) for g in level}
    last = streams.num_calibration - 1
    finished = _finished(pair, solved, pending)
    for numbers in streams.walk():
        if numbers[0] > last:
            continue
        seen: set[str] = set()
        takers = {
            pair.local(name): _shifted_taker(
                name, needs, total, streams, numbers, numbers == [last], seen, len(sums)
            )
            for name, total in sums.items()
        }
        with _before(pair.compressed, takers), given_again(finished, streams.store, numbers, seen):
            try:
                _run(pair.compressed, pair.index, streams, SHIFTED, numbers)
            except _StopForward:
                continue
    return sums


@torch.no_grad()
def pass_shifted(
    pair: BlockPair, solved: Sequence[str], streams: Streams
) -> tuple[BlockError, BlockError | None]:
    """Take the shifted stream through the compressed block, and hold it against the targets.

    Its outputs are kept under ``("next", number)``.

    Parameters
    ----------
    pair : BlockPair
    solved : sequence of str
        Linears that are replaced; empty if the block has changed since `pass_level`: all of it then
        runs.
    streams : Streams

    Returns
    -------
    calibration : BlockError
    held_out : BlockError or None
        None if no sequence was held out.

    Raises
    ------
    NumericalError
        If a hidden state is not finite.
    """
    sums = [BlockErrorSums(), BlockErrorSums()]
    finished = _finished(pair, solved, ())
    for numbers in streams.walk():
        is_held_out = numbers[0] >= streams.num_calibration
        again = {} if is_held_out else finished
        with given_again(again, streams.store, numbers, {""}):
            hidden = _run(pair.compressed, pair.index, streams, SHIFTED, numbers)
        sums[is_held_out].add(stacked(streams.store, (TARGET,), numbers).to(hidden.device), hidden)
        for number, states in zip(numbers, hidden, strict=True):
            streams.store.put((NEXT, number), states)
    for total in sums:
        if not total.is_finite:
            raise NumericalError(f"the outputs of {pair.path} are not finite")
    return sums[0].result(), sums[1].result() if sums[1].tokens else None


def step_forward(streams: Streams) -> None:
    """Make the outputs of a block the inputs of the next, in both streams; drop all else."""
    streams.store.move(TARGET, ORIGINAL)
    streams.store.move(NEXT, SHIFTED)
    for kind in (INPUT, ARRIVED, FINISHED):
        streams.store.drop_kind(kind)


def call_levels(path: str, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups in call order; those alike but for a number (experts) are one level.

    A linear that the forward of `discover` did not reach is a group of its own, in the level of the
    like linears that were reached.

    Examples
    --------
    >>> call_levels("layers.0", [])
    []
    """
    levels: dict[frozenset[str], list[InputGroup]] = {}
    for group in groups:
        kind = frozenset(
            re.sub(r"\b\d+\b", "*", site.name.removeprefix(path)) for site in group.sites
        )
        home = next((known for known in levels if kind <= known), kind)
        levels.setdefault(home, []).append(group)
    return list(levels.values())


def _run(block: nn.Module, index: int, streams: Streams, stream: str, numbers: list[int]) -> Tensor:
    args, kwargs = streams.call(index, numbers)
    device = next(block.parameters()).device
    output = block(stacked(streams.store, (stream,), numbers).to(device), *args, **kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _original_taker(
    name: str,
    needs: frozenset[str],
    sums: GroupSums | None,
    streams: Streams,
    numbers: list[int],
    is_last: bool,
) -> Callable[[Tensor], None]:
    """What is done with the inputs of a group in the original block."""

    def take(inputs: Tensor) -> None:
        if sums is not None:
            sums.add(inputs, None, is_last)
        if "shifted" in needs:
            paired = _by_sequence(name, inputs, streams, numbers)
            for number, rows in zip(numbers, paired, strict=True):
                streams.store.put((INPUT, name, number), rows)
        elif is_last:
            streams.store.put((INPUT, name, numbers[0]), inputs.reshape(-1, inputs.shape[-1]))

    return take


def _shifted_taker(
    name: str,
    needs: frozenset[str],
    sums: GroupSums,
    streams: Streams,
    numbers: list[int],
    is_last: bool,
    seen: set[str],
    wanted: int,
) -> Callable[[Tensor], None]:
    """What is done with the inputs of a group in the compressed block; the last one stops it."""

    def take(inputs: Tensor) -> None:
        original = None
        if "original" in needs:
            inputs = _by_sequence(name, inputs, streams, numbers)
            original = stacked(streams.store, (INPUT, name), numbers).to(inputs.device)
        sums.add(original, inputs, is_last)
        if is_last:
            rows = inputs.reshape(-1, inputs.shape[-1])
            streams.store.put((ARRIVED, name, numbers[0]), rows)
        seen.add(name)
        if len(seen) == wanted:
            raise _StopForward

    return take


def _by_sequence(name: str, inputs: Tensor, streams: Streams, numbers: list[int]) -> Tensor:
    """Inputs as (sequence, token, feature)."""
    length = streams.lengths[numbers[0]]
    tokens = inputs.shape[:-1].numel()
    if tokens != len(numbers) * length:
        raise ModelError(
            f"{name} receives {tokens} of {len(numbers) * length} tokens (routed?): its inputs in "
            "the two streams cannot be paired; use method shift-aware, or ignore it"
        )
    return inputs.reshape(len(numbers), length, inputs.shape[-1])


@contextmanager
def _before(block: nn.Module, takers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Give the inputs of each named linear to its taker; remove nothing but these hooks."""
    with ExitStack() as stack:
        for name, take in takers.items():

            def hook(
                _m: nn.Module, args: tuple[Any, ...], take: Callable[[Tensor], None] = take
            ) -> None:
                take(args[0])

            handle = block.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def _finished(
    pair: BlockPair, solved: Sequence[str], pending: Sequence[str]
) -> dict[str, nn.Module]:
    local = ({pair.local(name) for name in names} for names in (solved, pending))
    return finished_children(pair.compressed, *local)
