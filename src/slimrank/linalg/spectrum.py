"""What a spectrum says: effective rank, tail energy, the rank for a share of the energy."""

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    r"""Effective rank: the exponential of the entropy of the normalised singular values.

    .. math::

        \operatorname{erank} = \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \quad
        p_i = \sigma_i / \sum_j \sigma_j

    Parameters
    ----------
    singular_values : Tensor of shape (k,)
        The values themselves, not their squares; at least one is positive.

    Returns
    -------
    float
        Between 1 and the number of positive values; 0.0 if all are zero.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), equation 11; Roy and Vetterli (2007).

    Examples
    --------
    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    values = singular_values.double()
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values / total
    return float(torch.exp(torch.special.entr(share).sum()))


def normalized_effective_rank(
    singular_values: Float[Tensor, " k"], in_features: int, out_features: int
) -> float:
    """Effective rank over the largest rank the matrix can have, in (0, 1].

    The paper leaves the divisor open; this is ``min(in, out)``. Only that many leading values are
    used: beyond them a spectrum of outputs holds rounding noise, which the authors' code counts.

    Parameters
    ----------
    singular_values : Tensor of shape (k,)
        In descending order.
    in_features, out_features : int
        The sides of the matrix.

    Examples
    --------
    >>> normalized_effective_rank(torch.ones(4), in_features=4, out_features=8)
    1.0
    """
    side = min(in_features, out_features)
    return effective_rank(singular_values[:side]) / side


def tail_energy(singular_values: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_1"]:
    """Sum of squares left out by each rank, from rank 0 to full rank.

    Parameters
    ----------
    singular_values : Tensor of shape (k,)
        In descending order.

    Returns
    -------
    Tensor of shape (k + 1,), float64
        Entry ``r`` is the loss of keeping ``r`` values: the square of Swift-SVD's equation 4.

    Examples
    --------
    >>> tail_energy(torch.tensor([3.0, 2.0, 1.0])).tolist()
    [14.0, 5.0, 1.0, 0.0]
    """
    squares = singular_values.double().square()
    tail = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def rank_for_energy(singular_values: Float[Tensor, " k"], share: float) -> int:
    """Give the smallest rank that keeps a share of the sum of squares.

    Parameters
    ----------
    singular_values : Tensor of shape (k,)
        In descending order.
    share : float
        In [0, 1].

    Examples
    --------
    >>> rank_for_energy(torch.tensor([3.0, 2.0, 1.0]), 0.9)
    2
    """
    tail = tail_energy(singular_values)
    rounding = 1 + 1e-12  # 1 - 0.9 is a little less than a tenth
    return int((tail > (1 - share) * tail[0] * rounding).sum())
