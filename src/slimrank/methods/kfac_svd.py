"""KFAC-SVD: output errors in units of the model's loss."""

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
from slimrank.methods.base import require_moment, require_statistic


@dataclass(frozen=True, slots=True)
class KFACSVD:
    """Output errors weighed by the second moment of the loss gradient at the outputs.

    With ``g`` that gradient, ``G = E g gᵀ`` and ``S = E x xᵀ``, the Kronecker product of both is
    the K-FAC estimate of the curvature (Martens and Grosse, arXiv 1503.05671), and half the loss of
    this method is the rise of the model's loss that it predicts, in nats a token.

    Deviations from the paper: the two Kronecker factors are the moments themselves, each from one
    pass over the tokens, while GFWSVD fits them to the weight gradients of batches by a Lanczos
    iteration; a relative damping of ``G``, so that outputs without a gradient still count (see
    `slimrank.linalg.damped`); ``S`` is neither damped nor given a root.

    Parameters
    ----------
    damping : float
        Share of the mean diagonal that is added to ``G``.
    """

    name: ClassVar[str] = "kfac-svd"
    needs: ClassVar[frozenset[str]] = frozenset({"original", "gradients"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "GFWSVD (arXiv 2505.17974); K-FAC (arXiv 1503.05671)"
    objective: ClassVar[str] = "E (W x − W' x)ᵀ G (W x − W' x)"
    damping: float = 1e-2

    def metric(self, moments: Moments | None) -> Tensor:
        """The damped metric ``G`` that the losses are in, of shape (out, out)."""
        return damped(require_statistic(self.name, moments, "metric"), self.damping)

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Eigenvectors of the output moment of the original model, in the metric."""
        seen = require_moment(self.name, moments, "original")
        tokens = moments.known_tokens if moments else None
        return decompose_in_metric(weight, seen, self.metric(moments), tokens)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared error of the outputs in the original model, in the metric."""
        seen = require_moment(self.name, moments, "original")
        return output_loss(weight, factors, seen, self.metric(moments))
