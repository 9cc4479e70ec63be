"""One block and its compressed twin, on the same tokens: what arrives at each of their linears.

The original block takes its stream once, and all inputs of its linears are kept (this file). The
compressed one goes from group to group in call order (`slimrank.calibration.shifted`).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from slimrank.calibration.endings import Ending, noting_endings
from slimrank.calibration.finished import FINISHED, HELD
from slimrank.calibration.hooks import Taker, taking_inputs
from slimrank.calibration.replay import call_block
from slimrank.calibration.store import stacked, together
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams
from slimrank.calibration.sums import GroupSums, OutputEnergy
from slimrank.errors import ModelError
from slimrank.model import InputGroup, device_of

TARGET, INPUT, ARRIVED, NEXT = "target", "input", "arrived", "next"


@dataclass(slots=True)
class BlockPair:
    """A block that stays as it is, and the one that is being compressed.

    Parameters
    ----------
    index : int
    path : str
        Dotted name of the block in the model.
    original, compressed : nn.Module
    endings : dict of str to Ending
        By child of the block; filled in by `pass_original`.
    leaves_inputs : bool or None
        Whether the block writes nothing into the hidden states that it is given; None until it has
        been seen.
    """

    index: int
    path: str
    original: nn.Module
    compressed: nn.Module
    endings: dict[str, Ending] = field(default_factory=dict)
    leaves_inputs: bool | None = None

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
    calibration sequence, so are the inputs of each group under ``("input", linear, number)``.

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
    device = device_of(pair.original)
    found = OriginalPass()
    outputs: dict[str, OutputEnergy] = {}
    endings: dict[str, Ending | None] = {}
    names = [pair.local(site.name) for group in groups for site in group.sites]
    if needs == {"original"}:
        found.sums = {g.sites[0].name: GroupSums(g, needs, device) for g in groups}
    if needs == {"original", "shifted"}:
        outputs = {name: OutputEnergy(pair.original, name) for name in names}
    for numbers in streams.walk():
        with ExitStack() as stack:
            if numbers[0] in streams.calibration:
                takers = _takers(pair, groups, needs, found, streams, numbers)
                stack.enter_context(taking_inputs(pair.original, takers))
                for energy in outputs.values():
                    stack.enter_context(energy.listening())
                if "shifted" in needs:
                    stack.enter_context(noting_endings(pair.original, names, endings))
            hidden = run_stream(pair, streams, ORIGINAL, numbers)
        streams.store.put_rows((TARGET,), numbers, hidden, given_away=True)
    found.energies = {f"{pair.path}.{name}": energy.mean() for name, energy in outputs.items()}
    pair.endings.update({child: ending for child, ending in endings.items() if ending is not None})
    return found


def step_forward(streams: Streams) -> None:
    """Make the outputs of a block the inputs of the next, in both streams; drop all else."""
    streams.store.move(TARGET, ORIGINAL)
    streams.store.move(NEXT, SHIFTED)
    for kind in (INPUT, ARRIVED, FINISHED, HELD):
        streams.store.drop_kind(kind)


def run_stream(pair: BlockPair, streams: Streams, stream: str, numbers: list[int]) -> Tensor:
    """Outputs of a block for some sequences of its stream, on the block's device.

    The first ones are given to it as a copy; where it leaves that as it was, none is made again.

    Parameters
    ----------
    pair : BlockPair
    streams : Streams
    stream : str
        ``"original"``, for the block as it was, or ``"shifted"``.
    numbers : list of int

    Returns
    -------
    Tensor of shape (sequences, length, hidden)
    """
    block = pair.original if stream == ORIGINAL else pair.compressed
    read = together if pair.leaves_inputs else stacked
    states = read(streams.store, (stream,), numbers)
    version = states._version
    hidden = call_block(block, states, streams.call(pair.index, numbers))
    if pair.leaves_inputs is None:
        pair.leaves_inputs = states._version == version
    return hidden


def by_sequence(name: str, inputs: Tensor, streams: Streams, numbers: list[int]) -> Tensor:
    """Inputs of a linear as (sequence, token, feature).

    Raises
    ------
    ModelError
        If they are not one a token.
    """
    length = streams.lengths[numbers[0]]
    tokens = inputs.shape[:-1].numel()
    if tokens != len(numbers) * length:
        raise ModelError(
            f"{name} receives {tokens} of {len(numbers) * length} tokens (routed?): its inputs in "
            "the two streams cannot be paired; use method shift-aware, or ignore it"
        )
    return inputs.reshape(len(numbers), length, inputs.shape[-1])


def _takers(
    pair: BlockPair,
    groups: Sequence[InputGroup],
    needs: frozenset[str],
    found: OriginalPass,
    streams: Streams,
    numbers: list[int],
) -> dict[str, Taker]:
    """What is done with the inputs of each group, by the local name of its first linear."""
    is_last = numbers == [streams.num_calibration - 1]

    def take(name: str, inputs: Tensor) -> None:
        if name in found.sums:
            found.sums[name].add(inputs, None, is_last)
        if "shifted" in needs:
            paired = by_sequence(name, inputs, streams, numbers)
            streams.store.put_rows((INPUT, name), numbers, paired)
        elif is_last:
            streams.store.put((INPUT, name, numbers[0]), inputs.reshape(-1, inputs.shape[-1]))

    names = [group.sites[0].name for group in groups] if "original" in needs else []
    return {pair.local(name): partial(take, name) for name in names}
