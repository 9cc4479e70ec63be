"""AA-SVD: the objectives that look at what arrives in the compressed model."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import (
    Decomposition,
    Factors,
    Moments,
    anchored_loss,
    decompose_anchored,
    decompose_outputs,
    output_loss,
)
from slimrank.methods.base import require_moment


@dataclass(frozen=True, slots=True)
class ShiftAware:
    """The best map of rank k for the inputs that arrive in the compressed model.

    Its target moves with the shift, so errors upstream are never made good. In one-shot order
    nothing has shifted, and it is `swift-svd`.
    """

    name: ClassVar[str] = "shift-aware"
    needs: ClassVar[frozenset[str]] = frozenset({"shifted"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "AA-SVD (arXiv 2604.02119), objective 3; Dobi-SVD (arXiv 2502.02723)"
    objective: ClassVar[str] = "E ‖W x' − W' x'‖²"

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Eigenvectors of the output moment on the shifted inputs."""
        seen = require_moment(self.name, moments, "shifted")
        return decompose_outputs(weight, seen, moments.known_tokens if moments else None)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared error of the outputs on the shifted inputs."""
        return output_loss(weight, factors, require_moment(self.name, moments, "shifted"))


@dataclass(frozen=True, slots=True)
class AASVD:
    """Anchored to the outputs of the original model, adapted to the inputs that arrive.

    Deviations from the paper: a ridge on the moments, on by default (its size is settled in
    ``docs/aa-svd.md``); where the shifted moment is singular the target keeps what the weight says,
    while the paper's pseudo-inverse makes it zero there. Deviations from the authors' code: float64
    in the solve; the cross moment is summed as that of the *shift* ``(x − x') x'ᵀ``, so that equal
    streams give exactly the input-aware solution; a ridge goes to both moments and is relative,
    instead of an absolute one on one of them after a failure; their code's headline rows are the
    input-aware objective with refinement, not this one.

    Parameters
    ----------
    anchor : float
        Share α of the original inputs in the target: ``W (α x + (1 − α) x')``. 1 is the paper's
        objective; 0 is `shift-aware`. The authors' code has it, and never sets it.
    """

    name: ClassVar[str] = "aa-svd"
    needs: ClassVar[frozenset[str]] = frozenset({"original", "shifted"})
    default_ridge: ClassVar[float] = 0.1
    paper: ClassVar[str] = "AA-SVD (arXiv 2604.02119), theorem 3.2, objective 4"
    objective: ClassVar[str] = "E ‖W x − W' x'‖²"
    anchor: float = 1.0

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Eigenvectors of the moment of the outputs that are best predicted."""
        require_moment(self.name, moments, "shifted")
        assert moments is not None
        return decompose_anchored(weight, moments, self.anchor)

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Mean squared distance from the outputs of the original model."""
        require_moment(self.name, moments, "shifted")
        assert moments is not None
        return anchored_loss(weight, factors, moments, self.anchor)
