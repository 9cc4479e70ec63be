"""A product of low rank with some of its own rows as the right factor.

A matrix ``W' = L R`` of rank r has ``r (out + in − r)`` degrees of freedom, not ``r (out + in)``:
r of its rows, ``W'[P] = L[P] R``, span all others, ``W'[Q] = C W'[P]`` with ``C = L[Q] L[P]⁻¹``.
Kept are `P`, ``W'[P]`` and ``C`` (PIFA, arXiv 2501.19090). Nothing is lost.

How well this is rounded depends on ``C`` alone: an error of a latent reaches other outputs times an
entry of it. Rows that come of elimination with pivoting give small entries as a rule, and have no
better bound than ``2^r``. So here rows are exchanged after it until no entry is over a bound, as in
strong rank-revealing factorisations (Gu and Eisenstat, 1996) and in maxvol (Goreinov et al., 2010).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from slimrank.errors import NumericalError
from slimrank.linalg.exact import in_float64
from slimrank.linalg.lowrank import Factors
from slimrank.linalg.psd import require_finite

LARGEST_INVERSE = 1e8  # entry of QR's inverse root, up to which columns are independent for sure


@dataclass(frozen=True, slots=True)
class PivotedFactors:
    """A matrix of low rank as some of its rows, and the others as combinations of these.

    Parameters
    ----------
    pivots : Tensor of shape (rank,), int64
        Numbers of the rows in `latent`, ascending.
    latent : Tensor of shape (rank, in)
    expand : Tensor of shape (out - rank, rank)
        All other rows are ``expand @ latent``, by ascending number.
    """

    pivots: Int64[Tensor, " rank"]
    latent: Float[Tensor, "rank in"]
    expand: Float[Tensor, "others rank"]

    def factors(self) -> Factors:
        """Write it as a product, with rows of the identity in ``left``."""
        return Factors(
            left=self._scatter(self.expand, torch.eye(len(self.pivots))), right=self.latent
        )

    def dense(self) -> Float[Tensor, "out in"]:
        """Multiply the product out; the pivot rows are copied."""
        return self._scatter(self.expand @ self.latent, self.latent)

    def _scatter(self, others: Tensor, chosen: Tensor) -> Tensor:
        whole = others.new_empty(len(others) + len(self.pivots), others.shape[1])
        whole[other_rows(self.pivots, len(whole))] = others
        whole[self.pivots] = chosen.to(whole)
        return whole


def pivot_rows(factors: Factors, bound: float = 2.0) -> PivotedFactors:
    """Choose rows that span a product of low rank, and write the others in them.

    Starts from the rows that an LU factorisation with partial pivoting brings to the top of
    ``left``. While a coefficient ``c`` is over the bound in size, its row and its pivot are
    exchanged; this multiplies the volume of the chosen rows by ``|c|``, so it ends. Columns of
    ``left`` that depend on others (a product of smaller rank than it is written with) leave rows
    free to choose: the first that are left, with coefficients of zero.

    Parameters
    ----------
    factors : Factors
        Of any dtype; a rank of at most the rows.
    bound : float
        Over 1: no coefficient is larger in size. At 1 the exchanges might not end.

    Returns
    -------
    PivotedFactors
        In float64, to be rounded once when stored. The product is that of `factors`, to rounding.

    Raises
    ------
    NumericalError
        If a factor is not finite, or more exchanges are asked for than the volume allows.
    ValueError
        If the rank is over the number of rows, or the bound is not over 1.

    References
    ----------
    PIFA (arXiv 2501.19090) for the layout; the exchanges are ours.

    Examples
    --------
    The middle row is half of each of the others.

    >>> left = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    >>> found = pivot_rows(Factors(left, torch.eye(2)))
    >>> found.pivots.tolist(), [round(float(c), 9) for c in found.expand[0]]
    ([0, 2], [0.5, 0.5])
    """
    if not bound > 1:
        raise ValueError(f"coefficients are bounded by more than 1, not by {bound:g}")
    require_finite(factors.left, "the left factor")
    require_finite(factors.right, "the right factor")
    left, right = in_float64(factors.left.detach()), in_float64(factors.right.detach())
    out_features, rank = left.shape
    if rank > out_features:
        raise ValueError(f"rank {rank} is over the {out_features} rows that pivots are chosen of")
    basis = _independent_columns(left)
    chosen = _spanning_rows(basis, bound)
    filled = other_rows(chosen, out_features)[: rank - len(chosen)]
    pivots, place = torch.cat([chosen, filled]).sort()
    others = other_rows(pivots, out_features)
    expand = left.new_zeros(out_features - rank, rank)
    expand[:, : len(chosen)] = torch.linalg.solve(basis[chosen], basis[others], left=False)
    return PivotedFactors(pivots, left[pivots] @ right, expand[:, place])


def other_rows(pivots: Tensor, out_features: int) -> Int64[Tensor, " others"]:
    """Numbers of the rows that are no pivots, ascending.

    Its steps depend on no values, so it can be traced, and run without data.

    Parameters
    ----------
    pivots : Tensor of shape (rank,)
        Of any integer dtype; all different and within the rows, which is not looked at here.
    out_features : int

    Examples
    --------
    >>> other_rows(torch.tensor([3, 1]), 5).tolist()
    [0, 2, 4]
    """
    taken = torch.zeros(out_features, dtype=torch.int32, device=pivots.device)
    taken = taken.index_fill(0, pivots.long(), 1)
    return taken.argsort(stable=True)[: out_features - len(pivots)]


def _independent_columns(left: Tensor) -> Tensor:
    """Orthonormal columns with the span of those given, however these are scaled."""
    sizes = torch.linalg.vector_norm(left, dim=0)
    columns = left[:, sizes > 0] / sizes[sizes > 0]
    basis: Tensor
    basis, triangle = torch.linalg.qr(columns)
    identity = torch.eye(len(triangle)).to(triangle)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    if (inverse.abs() < LARGEST_INVERSE).all():  # false for NaN
        return basis
    basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
    noise = max(columns.shape) * torch.finfo(values.dtype).eps
    return basis[:, values > noise * values[0]]


def _spanning_rows(basis: Tensor, bound: float) -> Tensor:
    """Rows in which every other row has coefficients within the bound."""
    rows, rank = basis.shape
    packed, exchanges = torch.linalg.lu_factor(basis)
    order = _permutation(exchanges.tolist(), rows).to(basis.device)
    chosen, others = order[:rank], order[rank:]
    coefficients = torch.linalg.solve_triangular(
        packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True
    )
    # orthonormal columns have no volume over 1, and each exchange multiplies it by over `bound`
    volume = float(packed.diagonal().abs().log().sum())
    for _ in range(math.ceil(-volume / math.log(bound)) + 1):
        if not coefficients.numel():
            break
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        if not abs(float(coefficients[row, column])) > bound:
            break
        _exchange(coefficients, row, column)
        chosen[column], others[row] = others[row].clone(), chosen[column].clone()
    else:
        raise NumericalError(
            f"no {rank} of {rows} rows were found that give the others with coefficients up to "
            f"{bound:g}: the factors are too ill conditioned for the pivoted layout; use the plain"
        )
    return chosen


def _exchange(coefficients: Tensor, row: int, column: int) -> None:
    """Let a row take a pivot's place: coefficients of all others in the new pivots.

    With ``a = Σ c_k p_k`` the old pivot is ``p_j = (a − Σ_{k≠j} c_k p_k) / c_j``, put into the
    other rows. The row's own place is now the old pivot's.
    """
    pivot = coefficients[row, column].clone()
    step = coefficients[row] / pivot
    step[column] = 1 - 1 / pivot
    old = coefficients[:, column].clone()
    old[row] = pivot + 1
    coefficients.addr_(old, step, alpha=-1)


def _permutation(exchanges: list[int], rows: int) -> Tensor:
    """Order of rows after LAPACK's exchanges, which count from 1."""
    order = list(range(rows))
    for place, other in enumerate(exchanges):
        order[place], order[other - 1] = order[other - 1], order[place]
    return torch.tensor(order)
