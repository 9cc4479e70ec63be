"""The moment between two streams, summed as they pass by together."""

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank.linalg.exact import float64_device, in_float64
from slimrank.linalg.moments import (
    SMALL_BLOCK,
    Centred,
    add_product,
    heavy_tokens,
    require_squarable,
    typical_mean,
)


class DriftAccumulator:
    """Running sum of ``(x − z) zᵀ`` over tokens: float32 products, float64 sums.

    The cross moment ``x zᵀ`` of AA-SVD is this and the shifted moment ``z zᵀ``. Summed apart, equal
    streams give exactly zero, and what is rounded is as small as the shift. ``z`` is taken about a
    fixed centre, and heavy tokens and small blocks in float64, as in `MomentAccumulator`.

    Parameters
    ----------
    features : int
    device : torch.device or str, optional

    Examples
    --------
    >>> accumulator = DriftAccumulator(2)
    >>> accumulator.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
    >>> accumulator.result().tolist()
    [[1.0, 3.0], [-3.0, -9.0]]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self._is_centred = False
        device = float64_device(device)
        self._centre = torch.zeros(features, dtype=torch.float64, device=device)
        self._first = torch.zeros(features, dtype=torch.float64, device=device)
        self._products: Tensor | None = None

    def update(
        self,
        original: Float[Tensor, "*batch features"],
        shifted: Float[Tensor, "*batch features"],
        centred: Centred | None = None,
    ) -> None:
        """Add a block of tokens, the same in both streams.

        Parameters
        ----------
        original, shifted : Tensor of shape (..., features)
            Any floating dtype. Not changed.
        centred : Centred, optional
            What `MomentAccumulator.update` gave for the shifted ones; worked out here if left out.

        Raises
        ------
        NumericalError
            If a value is NaN, infinite or too large to square.
        """
        x = original.detach().reshape(-1, self.features)
        z = shifted.detach().reshape(-1, self.features)
        exact = z.dtype == torch.float64 or len(z) < SMALL_BLOCK
        x, z = (in_float64(x), in_float64(z)) if exact else (x.float(), z.float())
        drift = x - z
        sizes = require_squarable(drift)
        if not sizes.any():
            self.tokens += len(z)
            return
        centred = centred or self._centred(z)
        if centred.centre is not self._centre:
            self._move_centre(centred.centre)
        heavy, about = centred.heavy | heavy_tokens(sizes), centred.tokens
        self.tokens += len(z)
        rows = heavy.nonzero().flatten()
        if len(rows):
            exactly = in_float64(x[rows]) - in_float64(z[rows])
            self._add(exactly, in_float64(z[rows]) - self._centre.to(exactly.device))
            drift.index_fill_(0, rows, 0)
        self._add(drift, about)

    def _centred(self, z: Tensor) -> Centred:
        """The block about the centre, which ordinary tokens of the first large one settle."""
        centre = self._centre
        if not self._is_centred and len(z) >= SMALL_BLOCK:
            require_squarable(z)
            centre = in_float64(typical_mean(z).float()).to(self._centre.device)
        about = z - centre.to(z)
        return Centred(about, centre, heavy_tokens(require_squarable(about)))

    def merge(self, other: "DriftAccumulator") -> None:
        """Add what another accumulator saw. Order does not matter beyond rounding."""
        if other.features != self.features:
            raise ValueError(f"cannot merge {other.features} features into {self.features}")
        if not self._is_centred and other._is_centred:
            self._move_centre(other._centre.to(self._centre))
        self.tokens += other.tokens
        if other._products is not None:
            shift = other._centre.to(self._centre) - self._centre
            first = other._first.to(shift)
            self._sums().add_(other._products.to(shift)).addr_(first, shift)
            self._first += first

    def result(self) -> Float[Tensor, "n n"] | None:
        """Mean over tokens; None if the streams never differed."""
        if self._products is None:
            return None
        return torch.addr(self._products, self._first, self._centre).div_(max(self.tokens, 1))

    def _move_centre(self, centre: Float[Tensor, " features"]) -> None:
        if self._products is not None:
            self._products.addr_(self._first, self._centre - centre)
        self._centre, self._is_centred = centre, True

    def _add(self, drift: Tensor, centred: Tensor) -> None:
        self._first += in_float64(drift.sum(dim=0)).to(self._first.device)
        add_product(self._sums(), drift, centred)

    def _sums(self) -> Tensor:
        if self._products is None:
            self._products = torch.zeros(
                self.features, self.features, dtype=torch.float64, device=self._centre.device
            )
        return self._products
