"""Second moments of one block's inputs, taken while a batch passes through it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimrank.calibration.hooks import Taker, inputs_of, taking_inputs
from slimrank.calibration.importance import BlockInfluence
from slimrank.calibration.joint import joint_moments
from slimrank.calibration.replay import Batch, Batches, run_block
from slimrank.calibration.token_check import gap_on_tokens
from slimrank.linalg import MomentAccumulator, Moments, in_float64, output_loss
from slimrank.model import InputGroup, device_of
from slimrank.nn import LowRankLinear


@dataclass(frozen=True, slots=True)
class LastInputs:
    """What a group received in the last batch: its moments are made when they are asked for.

    They take as much memory as those of all batches, and are wanted for one linear at a time.
    """

    features: int
    inputs: list[Tensor]

    def moments(self) -> Moments:
        """Over the last batch only, to hold against its tokens (see `check_on_tokens`)."""
        accumulator = MomentAccumulator(self.features, _device(self.inputs))
        for inputs in self.inputs:
            accumulator.update(inputs)
        return accumulator.taken()


@dataclass(frozen=True, slots=True)
class BlockMoments:
    """Moments of each group of a block.

    Parameters
    ----------
    total : tuple of Moments
        Over all batches of all processes.
    last : tuple of LastInputs
        Of the last own batch only.
    influence : float
        Of the block on all tokens of all processes (see `BlockInfluence`).
    influence_behind : float or None
        The same with what follows the block counted in; None if nobody asked, or the width changes.
    """

    total: tuple[Moments, ...]
    last: tuple[LastInputs, ...]
    influence: float
    influence_behind: float | None = None


def collect_moments(
    model: nn.Module,
    block: nn.Module,
    index: int,
    groups: Sequence[InputGroup],
    batches: Batches | list[Batch],
    behind: Callable[[Batch], Tensor] | None = None,
) -> BlockMoments:
    """Take all batches through a block once, and sum the second moments of its inputs.

    Parameters
    ----------
    model, block : nn.Module
    index : int
        Position of the block.
    groups : sequence of InputGroup
        One accumulator each.
    batches : Batches or list of Batch
        In front of the block; replaced one by one by what comes out of it, so that hidden states
        are held once.
    behind : callable, optional
        What the model makes of the states behind the block (see `after_blocks`): to measure the
        block's influence with that counted in as well.

    Raises
    ------
    NumericalError
        If an activation is not finite, with the linear's name.
    CheckpointError
        If hidden states go to disk, and it is full.
    """
    device = device_of(block)
    total = [MomentAccumulator(group.in_features, device) for group in groups]
    last = tuple(LastInputs(group.in_features, []) for group in groups)
    influence, influence_behind = BlockInfluence(), BlockInfluence()
    for number in range(len(batches)):
        is_last = number == len(batches) - 1
        takers = {
            group.sites[0].name: _adder(group, sums, kept.inputs if is_last else None)
            for group, sums, kept in zip(groups, total, last, strict=True)
        }
        entering = batches[number]
        with taking_inputs(model, takers):
            leaving = run_block(block, index, entering)
        batches[number] = leaving
        influence.add(entering.hidden, leaving.hidden)
        states = behind(leaving) if behind else entering.hidden[..., :0]
        if states.shape == entering.hidden.shape:
            influence_behind.add(entering.hidden, states)
    found: list[Moments] = []
    while total:  # sums of the widest linears are the largest thing there is: let go one by one
        found.append(joint_moments(total.pop(0).taken()))
    influence.merge_all()
    influence_behind.merge_all()
    return BlockMoments(
        total=tuple(found),
        last=last,
        influence=influence.value,
        influence_behind=influence_behind.value if influence_behind.tokens else None,
    )


def _device(inputs: Sequence[Tensor]) -> torch.device:
    return inputs[0].device if inputs else torch.device("cpu")


def check_on_tokens(
    model: nn.Module,
    block: nn.Module,
    index: int,
    batch: Batch,
    replacements: Mapping[str, LowRankLinear],
    last: Mapping[str, LastInputs],
) -> dict[str, float]:
    """Hold the moments against the tokens they came from.

    The batch goes through the original block once more, and at each linear the error of its
    replacement is taken token by token, in float32. It must be what the batch's second moment says.

    Parameters
    ----------
    model, block : nn.Module
        The replacements are not in it yet.
    index : int
    batch : Batch
        As it enters the block.
    replacements : mapping of str to LowRankLinear
    last : mapping of str to LastInputs
        What each linear received in this very batch when its moments were summed.

    Returns
    -------
    dict of str to float
        Relative gap, for each linear that saw tokens.

    Raises
    ------
    NumericalError
        If they disagree: the moments are then not those of what the linears receive.
    """
    sums = {name: _ErrorSums() for name in replacements}
    takers = {
        name: _measurer(model.get_submodule(name), replacement, sums[name])
        for name, replacement in replacements.items()
    }
    with taking_inputs(model, takers):
        run_block(block, index, batch)
    takers.clear()  # they hold all weights in float32
    gaps: dict[str, float] = {}
    for name, replacement in replacements.items():
        moments = last[name].moments()
        tokens = moments.tokens
        if tokens == 0:
            continue
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        expected = output_loss(weight, replacement.factors(), moments.original)
        seen, energy = sums[name].error / tokens, sums[name].energy / tokens
        gaps[name] = gap_on_tokens(name, seen, expected, 1e-6 * energy)
    return gaps


@dataclass(slots=True)
class _ErrorSums:
    """Over tokens: squared error of a replacement, and squared norm of the original's outputs."""

    error: float = 0.0
    energy: float = 0.0


def _measurer(linear: nn.Module, replacement: LowRankLinear, sums: _ErrorSums) -> Taker:
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().float()
    factors = replacement.factors()
    left, right = factors.left.float(), factors.right.float()

    def measure(inputs: Tensor) -> None:
        tokens = inputs.reshape(-1, weight.shape[1]).float()
        outputs = tokens @ weight.mT
        sums.error += float(in_float64(outputs - tokens @ right.mT @ left.mT).square().sum())
        sums.energy += float(in_float64(outputs).square().sum())

    return measure


def _adder(group: InputGroup, accumulator: MomentAccumulator, kept: list[Tensor] | None) -> Taker:
    def add(inputs: Tensor) -> None:
        with inputs_of(group.sites[0].name):
            accumulator.update(inputs)
        if kept is not None:
            kept.append(inputs.detach().clone())

    return add
