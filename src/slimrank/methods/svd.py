"""Plain truncated SVD of the weight: the input-agnostic baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments, decompose_outputs, output_loss


@dataclass(frozen=True, slots=True)
class SVD:
    """Closest matrix of low rank in the Frobenius norm (Eckart and Young, 1936).

    All directions of the input count alike, which real activations do not bear out: it is here to
    be compared with.
    """

    name: ClassVar[str] = "svd"
    needs: ClassVar[frozenset[str]] = frozenset()
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "Eckart and Young (1936)"
    objective: ClassVar[str] = "‖W − W'‖²"

    def decompose(self, weight: Tensor, moments: Moments | None = None) -> Decomposition:
        """Singular value decomposition of the weight; moments are not looked at."""
        del moments
        return decompose_outputs(weight)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None = None) -> float:
        """Squared error of the weight."""
        del moments
        return output_loss(weight, factors)
