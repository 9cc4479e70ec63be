"""ASVD: inputs by their mean magnitude."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimrank.linalg import Decomposition, Factors, Moments, decompose_outputs, output_loss
from slimrank.linalg.psd import require_finite
from slimrank.methods.base import require_statistic


@dataclass(frozen=True, slots=True)
class ASVD:
    """Singular value decomposition of the weight with columns scaled by the size of their input.

    With ``s = (mean |x|)^α`` and ``B`` the left singular vectors of ``W diag(s)``, the best map is
    ``B Bᵀ W``: the scaling need not be divided out again.

    Deviations from the authors' code: nothing is added to ``s``, since a dead input needs no
    inverse here; solved exactly and in float64; the search for ranks by perplexity is not part of
    it.

    Parameters
    ----------
    alpha : float
        The exponent α; 0.5 as in the paper. With 0 it is `svd`.
    """

    name: ClassVar[str] = "asvd"
    needs: ClassVar[frozenset[str]] = frozenset({"magnitudes"})
    default_ridge: ClassVar[float] = 0.0
    paper: ClassVar[str] = "ASVD (arXiv 2312.05821)"
    objective: ClassVar[str] = "‖(W − W') diag(mean |x|)^α‖²"
    alpha: float = 0.5

    def moment(self, moments: Moments | None) -> Tensor:
        """``diag(s)²``, which stands in the place of a second moment, of shape (in, in)."""
        magnitudes = require_statistic(self.name, moments, "magnitudes")
        require_finite(magnitudes, "the magnitudes")
        return torch.diag(magnitudes.detach().double().pow(2 * self.alpha))

    def decompose(self, weight: Tensor, moments: Moments | None) -> Decomposition:
        """Left singular vectors of the scaled weight."""
        return decompose_outputs(weight, self.moment(moments))

    def loss(self, weight: Tensor, factors: Factors, moments: Moments | None) -> float:
        """Squared error of the weight, column by column in the size of the inputs."""
        return output_loss(weight, factors, self.moment(moments))
