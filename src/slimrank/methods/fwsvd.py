"""FWSVD: rows of the weight by their Fisher information."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import (
    Decomposition,
    Factors,
    Moments,
    damped,
    decompose_in_metric,
    output_loss,
)
from slimrank.methods.base import require_statistic

SMALLEST_WEIGHT = 1e-6  # share of the mean row weight, added to each


@dataclass(frozen=True, slots=True)
class FWSVD:
    """Singular value decomposition of the weight with rows scaled by the root of their Fisher sum.

    The Fisher information of single entries has no closed form; their sum ``d`` over each row does.
    The inputs are not looked at, other than through the gradients.

    Deviations from the paper: a row is one of PyTorch's ``W (out, in)``, so the weights are those
    of outputs; a millionth of the mean weight is added to each, since a row without a gradient has
    no inverse of its weight; no training follows.
    """

    name: ClassVar[str] = "fwsvd"
    needs: ClassVar[frozenset[str]] = frozenset({"weight_gradients"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "FWSVD (arXiv 2207.00112)"
    objective: ClassVar[str] = "‖diag(d)^½ (W − W')‖²"

    def metric(self, moments: Moments | None) -> Tensor:
        """The diagonal of the metric that the losses are in, of shape (out,)."""
        return damped(require_statistic(self.name, moments, "row_weights"), SMALLEST_WEIGHT)

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Singular vectors of the scaled weight, scaled back."""
        return decompose_in_metric(weight, None, self.metric(moments))

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Squared error of the weight, row by row in their weights."""
        return output_loss(weight, factors, metric=self.metric(moments))
