"""What an allocator may see of a linear."""

import math
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from slimrank.allocation.budget import LinearShape
from slimrank.errors import NumericalError
from slimrank.linalg import tail_energy


@dataclass(frozen=True, slots=True)
class LinearProfile:
    """A linear's shape, place, spectrum and importance; no weight.

    Parameters
    ----------
    shape : LinearShape
    kind : str
        Module type, such as 'q_proj': whom it may share ranks with.
    block : int
        Position of its block among the blocks of the model.
    singular_values : Tensor of shape (min(out, in),), float64
        Of the outputs, descending, all of them; the squares are mean energy per token. A taller
        spectrum than ``min(out, in)``, as the authors' code keeps, holds rounding noise.
    tokens : int
        How many tokens the spectrum is of.
    importance : float
        Influence of its block (Swift-SVD's β before normalisation), the same for all linears of the
        block.

    Raises
    ------
    ValueError
        If the singular values are not ``min(out, in)`` many, or not descending.
    NumericalError
        If a singular value or the importance is not finite.

    Examples
    --------
    >>> import torch
    >>> spectrum = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    >>> profile = LinearProfile(LinearShape("0.q", 3, 4), "q", 0, spectrum, 9, 0.25)
    >>> profile.residual(2), profile.residual(3)
    (3.0, 0.0)
    """

    shape: LinearShape
    kind: str
    block: int
    singular_values: Float64[Tensor, " k"]
    tokens: int
    importance: float

    def __post_init__(self) -> None:
        name, values = self.shape.name, self.singular_values
        side = min(self.shape.out_features, self.shape.in_features)
        if len(values) != side:
            raise ValueError(f"{name}: a spectrum of {side} values is needed, not of {len(values)}")
        if not bool(values.isfinite().all()):
            raise NumericalError(f"{name}: its spectrum is not finite; calibrate again")
        if not math.isfinite(self.importance):
            raise NumericalError(f"{name}: the importance of block {self.block} is not finite")
        if bool((values.diff() > 0).any()):
            raise ValueError(f"{name}: singular values must descend")

    def residual(self, rank: int) -> float:
        r"""Least output error at a rank: Swift-SVD's ε*, over all tokens together.

        .. math:: \varepsilon^*_k = \Bigl(\sum_{j > k} \sigma_j^2\Bigr)^{1/2}

        Equation 4 takes the spectrum of the stacked outputs, whose squares are sums over tokens;
        ours are means, so `tokens` goes back in. The figure grows with the size of the sample, as
        the paper's does.

        Parameters
        ----------
        rank : int

        Returns
        -------
        float
            A Frobenius norm, in the units of the outputs.

        Raises
        ------
        ValueError
            If the rank is not within 0 and ``min(out, in)``.
        """
        largest = len(self.singular_values)
        if not 0 <= rank <= largest:
            raise ValueError(f"{self.shape.name}: rank {rank} is not within 0 and {largest}")
        return math.sqrt(self.tokens * float(tail_energy(self.singular_values)[rank]))
