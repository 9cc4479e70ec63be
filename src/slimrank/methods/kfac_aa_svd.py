"""AA-SVD in units of the model's loss: both papers' ideas in one solve."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import (
    Decomposition,
    Factors,
    Moments,
    anchored_target,
    damped,
    decompose_in_metric,
    in_float64,
    output_loss,
)
from slimrank.linalg.psd import require_finite
from slimrank.methods.base import require_moment, require_statistic


@dataclass(frozen=True, slots=True)
class KFACAASVD:
    """Anchored to the outputs of the original model, errors weighed by the loss's gradients there.

    `aa-svd` with the metric of `kfac-svd`. The best map of full rank does not depend on a metric,
    so its target is AA-SVD's, and only the directions that a rank keeps are others. What that map
    leaves, which no rank changes, is part of the losses where the moment of the original inputs is
    known; in a sequential run, which does not sum it, they are the excess over it.

    Parameters
    ----------
    damping : float
        Share of the mean diagonal that is added to ``G``.
    """

    name: ClassVar[str] = "kfac-aa-svd"
    needs: ClassVar[frozenset[str]] = frozenset({"original", "shifted", "gradients"})
    default_ridge: ClassVar[float] = 0.1
    paper: ClassVar[str] = "AA-SVD (arXiv 2604.02119) in the metric of K-FAC (arXiv 1503.05671)"
    objective: ClassVar[str] = "E (W x − W' x')ᵀ G (W x − W' x')"
    damping: float = 1e-2

    def metric(self, moments: Moments | None) -> Tensor:
        """The damped metric ``G`` that the losses are in, of shape (out, out)."""
        return damped(require_statistic(self.name, moments, "metric"), self.damping)

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Eigenvectors of the moment of the outputs that are best predicted, in the metric."""
        seen = require_moment(self.name, moments, "shifted")
        assert moments is not None
        metric, target = self.metric(moments), anchored_target(weight, moments)
        solved = decompose_in_metric(target, seen, metric, moments.known_tokens)
        return replace(solved, floor=_floor(weight, target, metric, moments))

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared distance from the outputs of the original model, in the metric."""
        seen = require_moment(self.name, moments, "shifted")
        assert moments is not None
        metric, target = self.metric(moments), anchored_target(weight, moments)
        excess = output_loss(target, factors, seen, metric)
        return excess + _floor(weight, target, metric, moments)


def _floor(weight: Tensor, target: Tensor, metric: Tensor, moments: Moments) -> float:
    """``E ‖Hᵀ (W x − T x')‖²``; 0 where the original inputs are not known, or have not shifted."""
    if moments.original is None:
        return 0.0
    require_finite(moments.original, "the second moment of the original inputs")
    if moments.shifted is None:
        return 0.0
    weight = in_float64(weight.detach())
    wanted = weight @ moments.original.to(weight) @ weight.mT
    reached = target @ moments.shifted.to(weight) @ target.mT
    return max(float(((wanted - reached) * metric.to(weight)).sum()), 0.0)
