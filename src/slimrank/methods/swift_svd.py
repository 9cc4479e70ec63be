"""Swift-SVD: the closed form without a root or an inverse."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments, decompose_outputs, output_loss
from slimrank.methods.base import require_moment


@dataclass(frozen=True, slots=True)
class SwiftSVD:
    """Projection on the top eigenvectors of the second moment of the outputs.

    Deviations from the paper: the moment is summed over *inputs* and carried to the outputs as
    ``W S Wᵀ``, which is the same matrix, is shared by linears with one input, and leaves biases and
    the rounding of outputs out; it is a mean over tokens, not a sum, so losses are per token.
    Deviations from the authors' code: float64 throughout the solve; ranks from each linear's shape.
    """

    name: ClassVar[str] = "swift-svd"
    needs: ClassVar[frozenset[str]] = frozenset({"original"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "Swift-SVD (arXiv 2604.01609), theorem 3.1"
    objective: ClassVar[str] = "E ‖W x − W' x‖²"

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Eigenvectors of the output moment of the original model."""
        seen = require_moment(self.name, moments, "original")
        return decompose_outputs(weight, seen, moments.known_tokens if moments else None)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared error of the outputs in the original model."""
        return output_loss(weight, factors, require_moment(self.name, moments, "original"))
