"""SVD-LLM: truncation-aware data whitening by a Cholesky root."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments, decompose_whitened, output_loss
from slimrank.methods.base import require_moment


@dataclass(frozen=True, slots=True)
class SVDLLM:
    """Truncated SVD of the weight times a Cholesky root of the input moment.

    The same optimum as `SwiftSVD` wherever the moment has a root; where it has none, a jitter is
    added and the two part ways.

    Deviations from the authors' code: float64 instead of float32; a jitter relative to the mean
    diagonal instead of an absolute one; the root is never inverted (see `decompose_whitened`); the
    layer-wise update step of the paper is not part of it.
    """

    name: ClassVar[str] = "svd-llm"
    needs: ClassVar[frozenset[str]] = frozenset({"original"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "SVD-LLM (arXiv 2403.07378), section 3.1"
    objective: ClassVar[str] = "E ‖W x − W' x‖²"

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Whiten by the inputs of the original model."""
        seen = require_moment(self.name, moments, "original")
        return decompose_whitened(weight, seen)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared error of the outputs in the original model."""
        return output_loss(weight, factors, require_moment(self.name, moments, "original"))
