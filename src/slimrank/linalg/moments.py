"""Second moments of activations, summed as they stream by.

The layout is PyTorch's: activations are ``(tokens, features)``. "Second moment" means the uncentred
mean of ``x xᵀ`` over tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank.errors import NumericalError

STRIPES = 4
HEAVY = 64.0


@dataclass(frozen=True, slots=True)
class Moments:
    """The second moment of what arrives at a linear.

    Parameters
    ----------
    original : Tensor of shape (in, in), float64
        Mean over tokens of ``x xᵀ``, symmetric; ``x`` is the input in the uncompressed model.
    tokens : int
        How many tokens were seen. With none, ``original`` is zero.
    """

    original: Float[Tensor, "n n"]
    tokens: int


class MomentAccumulator:
    """Running sum of ``x xᵀ`` over tokens: float32 products, float64 sums, lower triangle only.

    Two things keep the float32 products honest. Each block of tokens is multiplied on its own and
    added to a float64 sum, so errors do not grow with the number of tokens. And a token whose
    squared norm is over 64 times the block's median ("massive activations", attention sinks) is
    multiplied in float64, since in float32 its square would round away the other tokens' part.

    Parameters
    ----------
    features : int
        Width of the input.
    device : torch.device or str, optional
        Where the sums live; products are taken where the activations are.

    Examples
    --------
    >>> accumulator = MomentAccumulator(2)
    >>> accumulator.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> accumulator.result().original.tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self._sums = torch.zeros(features, features, dtype=torch.float64, device=device)

    @property
    def num_bytes(self) -> int:
        """Size of the running sum."""
        return self._sums.nbytes

    def update(self, inputs: Float[Tensor, "*batch features"]) -> None:
        """Add a block of tokens.

        Parameters
        ----------
        inputs : Tensor of shape (..., features)
            Any floating dtype; all leading axes are tokens. Not changed.

        Raises
        ------
        NumericalError
            If a value is NaN or infinite; the sums are then left as they were.
        """
        tokens = inputs.detach().reshape(-1, self.features)
        if tokens.shape[0] == 0:
            return
        exact = tokens if tokens.dtype == torch.float64 else tokens.float()
        norms = exact.square().sum(dim=1, dtype=torch.float64)
        if not torch.isfinite(norms).all():
            raise NumericalError(
                f"{int((~torch.isfinite(norms)).sum())} of {len(norms)} activations are NaN, "
                "infinite or too large to square"
            )
        heavy = norms > HEAVY * norms.median()
        if heavy.any():
            self._add(exact[heavy].double())
            exact = exact[~heavy]
        self._add(exact)
        self.tokens += tokens.shape[0]

    def _add(self, tokens: Float[Tensor, "tokens features"]) -> None:
        """Add the lower triangle of ``tokensᵀ tokens``, one stripe of rows at a time."""
        edges = [self.features * i // STRIPES for i in range(STRIPES + 1)]
        for start, end in pairwise(edges):
            if start < end:
                product = tokens[:, start:end].mT @ tokens[:, :end]
                self._sums[start:end, :end] += product.to(self._sums.device)

    def merge(self, other: "MomentAccumulator") -> None:
        """Add what another accumulator saw. Order does not matter beyond rounding."""
        if other.features != self.features:
            raise ValueError(f"cannot merge {other.features} features into {self.features}")
        self._sums += other._sums.to(self._sums.device)
        self.tokens += other.tokens

    def result(self) -> Moments:
        """Mean over tokens, with the upper triangle filled in."""
        lower = self._sums.tril()
        full = lower + lower.tril(-1).mT
        return Moments(original=full / max(self.tokens, 1), tokens=self.tokens)
