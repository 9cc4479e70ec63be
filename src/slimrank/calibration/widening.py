"""What a block is called with for many sequences, from what it is called with for one and two.

What doubles with the batch is repeated, what stays the same is shared.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimrank.calibration.replay import Call, equal_calls

WIDE = 16


@dataclass(frozen=True, slots=True)
class Kind:
    """What sequences of one kind are called with, block by block.

    Parameters
    ----------
    single : tuple of Call
        For one sequence.
    double : tuple of Call or None
        For two at once; None if they cannot be put together.
    wide : dict of (int, int) to Tensor
        The latest tensors that were repeated, by the one they repeat and how often: most blocks
        share theirs, and each is asked for by every micro-batch.
    """

    single: tuple[Call, ...]
    double: tuple[Call, ...] | None
    wide: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def call(self, block: int, size: int) -> Call:
        """What a block is called with for so many sequences."""
        if size == 1 or self.double is None:
            return self.single[block]
        call: Call = self._widened(self.single[block], self.double[block], size)
        return call

    def _widened(self, single: Any, double: Any, size: int) -> Any:
        if isinstance(single, Tensor):
            return single if single.shape == double.shape else self._repeated(single, size)
        if isinstance(single, (tuple, list)):
            both = zip(single, double, strict=True)
            return type(single)(self._widened(s, d, size) for s, d in both)
        if isinstance(single, dict):
            return {key: self._widened(single[key], double[key], size) for key in single}
        return single

    def _repeated(self, tensor: Tensor, size: int) -> Tensor:
        key = id(tensor), size
        if key not in self.wide:
            while len(self.wide) >= WIDE:
                del self.wide[next(iter(self.wide))]
            self.wide[key] = _repeated(tensor, size)
        return self.wide[key]


def can_widen(single: Any, double: Any) -> bool:
    """Tell whether what is given for two sequences is that of one, shared or repeated.

    Examples
    --------
    >>> one = torch.ones(1, 3)
    >>> can_widen([one], [torch.ones(2, 3)]), can_widen([one], [torch.ones(3, 3)])
    (True, False)
    """
    if isinstance(single, Tensor) and isinstance(double, Tensor):
        if single.shape == double.shape:
            return torch.equal(single, double)
        return _repeats(single, double) and torch.equal(_repeated(single, 2), double)
    if isinstance(single, (tuple, list)) and isinstance(double, (tuple, list)):
        return len(single) == len(double) and all(map(can_widen, single, double))
    if isinstance(single, dict) and isinstance(double, dict):
        return single.keys() == double.keys() and all(
            can_widen(single[key], double[key]) for key in single
        )
    return equal_calls(single, double)


def _repeats(single: Tensor, double: Tensor) -> bool:
    return double.shape == (2 * single.shape[0], *single.shape[1:]) if single.ndim else False


def _repeated(tensor: Tensor, size: int) -> Tensor:
    return tensor.repeat(size, *[1] * (tensor.ndim - 1))
