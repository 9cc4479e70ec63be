"""What a block is trained on: inputs as they arrive, outputs as they should be."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank import processes
from slimrank.linalg import in_float64

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A few sequences, on the block's device and in the model's dtype.

    Parameters
    ----------
    inputs : Tensor of shape (batch, length, hidden)
        The shifted stream in front of the block.
    targets : Tensor of shape (batch, length, hidden)
        What the original block gives on the original stream.
    call : tuple
        Positional and keyword arguments of the block beside the hidden states.
    numbers : tuple of int
        Those of the sequences, for whoever looks further than this block.
    """

    inputs: Float[Tensor, "batch length hidden"]
    targets: Float[Tensor, "batch length hidden"]
    call: Call
    numbers: tuple[int, ...] = ()


@runtime_checkable
class BlockData(Protocol):
    """Pairs of a block's shifted inputs and its original outputs, by sequence."""

    @property
    def num_sequences(self) -> int:
        """How many all processes have; they are numbered from 0."""
        ...

    def micro_batches(self, sequences: Sequence[int]) -> Iterator[MicroBatch]:
        """Those of these sequences that this process has, a few at once, the same at every call."""
        ...


@torch.no_grad()
def target_variance(data: BlockData) -> float:
    """Mean squared distance of the targets' elements from the mean of all of them.

    In float64, by merging the mean and the squares of each micro-batch (Chan, Golub and LeVeque,
    1983): nothing cancels, however far the mean is from zero.

    Parameters
    ----------
    data : BlockData

    Returns
    -------
    float
        0.0 exactly if all elements are equal or there are none; not finite if an element is not.
    """
    own = _Spread()
    for batch in data.micro_batches(range(data.num_sequences)):
        targets = in_float64(batch.targets)
        variance, mean = (float(part) for part in torch.var_mean(targets, correction=0))
        count = targets.numel()
        ends = float(targets.min()), float(targets.max())
        own = own.merged(_Spread(float(count), mean, count * variance, *ends))
    every = own
    if processes.count() > 1:
        every = _Spread()
        for spread in processes.gathered(*astuple(own)):
            every = every.merged(_Spread(*spread))
    if every.elements == 0 or every.low == every.high:
        return 0.0
    return every.squares / every.elements


@dataclass(frozen=True, slots=True)
class _Spread:
    """Of some elements: how many, their mean, sum of squares about it, and ends."""

    elements: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def merged(self, new: "_Spread") -> "_Spread":
        """Of both."""
        elements = self.elements + new.elements
        if elements == 0:
            return self
        gap = new.mean - self.mean
        return _Spread(
            elements,
            self.mean + gap * new.elements / elements,
            self.squares + (new.squares + gap**2 * new.elements * self.elements / elements),
            min(self.low, new.low),
            max(self.high, new.high),
        )


@torch.no_grad()
def metric_variance(data: BlockData, root: Float[Tensor, "hidden hidden"]) -> float:
    """Mean of ``‖Hᵀ (t − m 1)‖²`` over the targets' elements, with m the mean of all of them.

    In float64, of two passes. With the identity it is `target_variance`, and any root of one metric
    gives the same.

    Parameters
    ----------
    data : BlockData
    root : Tensor of shape (hidden, hidden)
        H.

    Returns
    -------
    float
        0.0 exactly if all elements are equal or there are none; not finite if an element is not.
    """
    every, sums, elements = range(data.num_sequences), [], 0
    low, high = math.inf, -math.inf
    for batch in data.micro_batches(every):
        sums.append(float(in_float64(batch.targets).sum()))
        elements += batch.targets.numel()
        low = min(low, float(batch.targets.min()))
        high = max(high, float(batch.targets.max()))
    own = math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan
    total, count = processes.sums(own, elements)
    negative_low, high = processes.largest([-low, high])
    if count == 0 or -negative_low == high:
        return 0.0
    if not math.isfinite(total):
        return math.nan
    mean = total / count
    squares = (
        float(((targets - mean) @ root.to(targets)).square().sum())
        for targets in (in_float64(batch.targets) for batch in data.micro_batches(every))
    )
    return processes.sums(math.fsum(squares))[0] / count
