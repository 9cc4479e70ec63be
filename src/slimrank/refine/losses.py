"""How far a block's outputs are from the original's: all features alike, or in a metric."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimrank.calibration import call_block
from slimrank.errors import NumericalError
from slimrank.linalg import cholesky_with_jitter, damped
from slimrank.refine.data import BlockData, MicroBatch, metric_variance, target_variance


@runtime_checkable
class Loss(Protocol):
    """What a block is trained by."""

    @property
    def unit(self) -> float:
        """What reported losses are divided by."""
        ...

    def total(self, block: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        """Sum over a micro-batch, in float32 or better, and how many elements it is the sum of."""
        ...


@dataclass(frozen=True, slots=True)
class SquaredError:
    """``‖Hᵀ (L(x) − L'(z))‖²`` over the elements of the outputs; H is the identity if left out.

    Parameters
    ----------
    unit : float
        Variance of the targets' elements, in the metric.
    root : Tensor of shape (hidden, hidden), optional
        H, of the metric ``G = H Hᵀ``. Any root gives the same losses.
    """

    unit: float
    root: Float[Tensor, "hidden hidden"] | None = None

    @classmethod
    def of(cls, calibration: BlockData, index: int) -> "SquaredError":
        """All features alike.

        Parameters
        ----------
        calibration : BlockData
            Gives the variance.
        index : int
            Position of the block, for the error.

        Raises
        ------
        NumericalError
            If the targets are not finite, all equal, or none.
        """
        return cls(_checked(target_variance(calibration), index))

    @classmethod
    def in_metric(
        cls,
        calibration: BlockData,
        index: int,
        metric: Float[Tensor, "hidden hidden"],
        damping: float,
    ) -> "SquaredError":
        """In a metric that is damped, and scaled to a mean diagonal of 1.

        So the identity, and any multiple of it, is the plain squared error, and a metric that is
        zero throughout is taken as the identity.

        Parameters
        ----------
        calibration : BlockData
        index : int
        metric : Tensor of shape (hidden, hidden)
            Positive semi-definite. For gradients of the model's loss, the mean over tokens of
            ``g gᵀ`` by the original block's outputs: half of an error in that metric estimates the
            rise of the loss in nats a token.
        damping : float
            Share of the mean diagonal that is added to it (see `slimrank.linalg.damped`).

        Raises
        ------
        NumericalError
            As `of`; or if the metric is not finite.
        """
        whole = damped(metric, damping)
        root, _ = cholesky_with_jitter(whole / whole.diagonal().mean())
        return cls(_checked(metric_variance(calibration, root), index), root)

    def total(self, block: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        """Sum of squares, and the number of elements."""
        with reduced_precision(batch.inputs):
            states = call_block(block, batch.inputs, batch.call)
        dtype = torch.promote_types(states.dtype, torch.float32)
        errors = states.to(dtype) - batch.targets.to(dtype)
        if self.root is not None:
            errors = errors @ self.root.to(errors)
        return errors.square().sum(), batch.targets.numel()


@contextmanager
def reduced_precision(like: Tensor) -> Iterator[None]:
    """Products in bfloat16 if a tensor of the model is in bfloat16 or float16; else as they are."""
    reduced = like.dtype.itemsize < torch.float32.itemsize
    device = like.device.type
    with torch.autocast(device, torch.bfloat16, enabled=reduced, cache_enabled=False):
        yield


def _checked(variance: float, index: int) -> float:
    if variance > 0 and math.isfinite(variance):
        return variance
    what = "all equal, or none" if variance == 0 else "not all finite"
    raise NumericalError(
        f"training block {index}: the original block's outputs are {what}; check the model "
        "and the calibration text"
    )
