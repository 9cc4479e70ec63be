"""Plain truncated SVD of the weight: the input-agnostic baseline."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimrank.linalg import Decomposition, Moments, decompose_outputs


@dataclass(frozen=True, slots=True)
class SVD:
    """Closest matrix of low rank in the Frobenius norm (Eckart and Young, 1936).

    All directions of the input count alike, which real activations do not bear out: it is here to
    be compared with.
    """

    name: ClassVar[str] = "svd"
    needs_moments: ClassVar[bool] = False
    paper: ClassVar[str] = "Eckart and Young (1936)"
    objective: ClassVar[str] = "‖W − W'‖²"

    def decompose(self, weight: Tensor, moments: Moments | None = None) -> Decomposition:
        """Singular value decomposition of the weight; moments are not looked at."""
        del moments
        return decompose_outputs(weight)
