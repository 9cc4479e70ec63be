"""What arrives at the linears of a block that is being compressed, from its first to its last.

Each pass stops in front of the next linears that are not solved yet, so every moment includes what
was replaced before. Inputs of a linear that a child of the block ends in are held: once the child's
linears are all solved, it goes on from there, and what it gives is given again. So in the common
case each linear runs once; the authors' code takes ten forwards.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from slimrank.calibration.finished import FINISHED, HELD, finished_children, given_again
from slimrank.calibration.hooks import taking_inputs
from slimrank.calibration.lockstep import (
    ARRIVED,
    INPUT,
    NEXT,
    TARGET,
    BlockPair,
    by_sequence,
    run_stream,
)
from slimrank.calibration.store import together
from slimrank.calibration.streams import SHIFTED, Streams
from slimrank.calibration.sums import BlockErrorSums, GroupSums
from slimrank.errors import NumericalError
from slimrank.model import InputGroup, device_of
from slimrank.report import BlockError


class _StopForward(Exception):
    """All inputs that a pass is for have been seen."""


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
        Linears of the block that are replaced already, and those that are to be. For a linear of
        this level that is pending, this is the last pass up to it: its original inputs are let go.
    needs : frozenset of str
    streams : Streams

    Returns
    -------
    dict of str to GroupSums
        By the group's first linear.
    """
    device = device_of(pair.compressed)
    sums = {g.sites[0].name: GroupSums(g, needs, device) for g in level}
    wanted = _Level(pair, sums, needs, streams, frozenset(pending))
    finished = _finished(pair, solved, pending)
    for numbers in streams.walk():
        if numbers[0] not in streams.calibration:
            continue
        seen: set[str] = set()
        takers = {pair.local(name): partial(wanted.take, name, numbers, seen) for name in sums}
        with (
            taking_inputs(pair.compressed, takers),
            given_again(finished, pair.endings, streams.store, numbers, seen),
        ):
            try:
                run_stream(pair, streams, SHIFTED, numbers)
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
        Of all processes, as `held_out`.
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
        is_held_out = numbers[0] not in streams.calibration
        again = {} if is_held_out else finished
        with given_again(again, pair.endings, streams.store, numbers, {""}):
            hidden = run_stream(pair, streams, SHIFTED, numbers)
        sums[is_held_out].add(together(streams.store, (TARGET,), numbers).to(hidden.device), hidden)
        streams.store.put_rows((NEXT,), numbers, hidden, given_away=True)
    for total in sums:
        total.merge_all()
        if not total.is_finite:
            raise NumericalError(f"the outputs of {pair.path} are not finite")
    for kind in (FINISHED, HELD):
        streams.store.drop_kind(kind)
    return sums[0].result(), sums[1].result() if sums[1].tokens else None


@dataclass(frozen=True, slots=True)
class _Level:
    """The inputs that a pass is for."""

    pair: BlockPair
    sums: Mapping[str, GroupSums]
    needs: frozenset[str]
    streams: Streams
    pending: Collection[str]

    def take(self, name: str, numbers: list[int], seen: set[str], inputs: Tensor) -> None:
        """Add the inputs of a group; those of the last one stop the pass."""
        store, is_last = self.streams.store, numbers == [self.streams.num_calibration - 1]
        original, arriving = None, inputs
        if "original" in self.needs:
            arriving = by_sequence(name, inputs, self.streams, numbers)
            original = together(store, (INPUT, name), numbers).to(inputs.device)
        self.sums[name].add(original, arriving, is_last)
        if is_last:
            store.put((ARRIVED, name, numbers[0]), inputs.reshape(-1, inputs.shape[-1]))
        elif name in self.pending:
            for number in numbers:
                store.drop((INPUT, name, number))
        if name in self.pending and not seen:
            self._hold(self.pair.local(name), numbers, inputs)
        seen.add(name)
        if len(seen) == len(self.sums):
            raise _StopForward

    def _hold(self, linear: str, numbers: list[int], inputs: Tensor) -> None:
        """Keep the inputs of a linear that a child of the block ends in."""
        ends = any(ending.linear == linear for ending in self.pair.endings.values())
        if ends and len(inputs) == len(numbers):
            self.streams.store.put_rows((HELD, linear), numbers, inputs)


def _finished(
    pair: BlockPair, solved: Sequence[str], pending: Sequence[str]
) -> dict[str, nn.Module]:
    local = ({pair.local(name) for name in names} for names in (solved, pending))
    return finished_children(pair.compressed, *local)
