"""Matrices in eight bits: codes, one scale for each row, and what the rounding costs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from slimrank.errors import NumericalError
from slimrank.linalg.exact import in_float64
from slimrank.linalg.lowrank import Factors

LARGEST_CODE = 127


class RoundedRows(NamedTuple):
    """A matrix in eight bits.

    Attributes
    ----------
    codes : Tensor of shape (rows, columns), int8
        From -127 to 127.
    scale : Tensor of shape (rows,)
        ``matrix ≈ codes * scale[:, None]``; 0 for a row of zeros.
    """

    codes: Int8[Tensor, "rows columns"]
    scale: Float[Tensor, " rows"]

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """Multiply codes by scales, in the dtype of these."""
        return self.codes.to(self.scale.dtype) * self.scale[:, None]


def round_rows(
    matrix: Float[Tensor, "rows columns"], dtype: torch.dtype | None = None
) -> RoundedRows:
    """Round to eight bits, symmetrically, each row by its entry of largest size.

    The scale is rounded up to a number of its dtype before the codes are taken, so that no code is
    cut off and a scale of 16 bits adds nothing to the error of the codes.

    Parameters
    ----------
    matrix : Tensor of shape (rows, columns)
    dtype : torch.dtype, optional
        Of the scales; that of the matrix if left out.

    Returns
    -------
    RoundedRows
        With ``|matrix - codes * scale| <= scale / 2``.

    Raises
    ------
    NumericalError
        If an entry is not finite, or a scale is beyond its dtype.

    Examples
    --------
    >>> rows = round_rows(torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0]]))
    >>> rows.codes.tolist(), rows.scale.tolist()
    ([[127, -63, 1], [0, 0, 0]], [1.0, 0.0])
    """
    values = in_float64(matrix.detach())
    exact = values.abs().amax(dim=1) / LARGEST_CODE
    scale = exact.to(dtype or matrix.dtype)
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(in_float64(scale) < exact, above, scale)
    if not torch.isfinite(scale).all():
        raise NumericalError(
            f"cannot round a matrix to eight bits: an entry is not finite, or beyond {scale.dtype}"
        )
    steps = in_float64(scale)[:, None]
    codes = torch.where(steps > 0, values / steps, 0.0).round().to(torch.int8)
    return RoundedRows(codes, scale)


def even_columns(factors: Factors) -> Factors:
    """Give the columns of ``left`` unit length; the product is the same, in float64.

    With one scale for each row of ``left``, a column that is small beside the others is rounded
    by steps made for these. What is taken from it goes to a row of ``right``, where the scale of
    that row takes it up without loss. Among all lengths of the columns, equal ones give the least
    error on white inputs, as long as the rows of ``left`` have their entries spread alike.

    Examples
    --------
    >>> factors = Factors(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.eye(2))
    >>> even_columns(factors).right.tolist()
    [[5.0, 0.0], [0.0, 1.0]]
    """
    left, right = in_float64(factors.left), in_float64(factors.right)
    lengths = torch.linalg.vector_norm(left, dim=0)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return Factors(left=left / lengths, right=right * lengths[:, None])


def principal_components(factors: Factors) -> Factors:
    """Give ``left`` orthonormal columns and ``right`` orthogonal rows; the product is the same.

    For factors of the pivoted layout that are to be rounded with one scale for each component:
    their rows of the identity make the steps coarse for all others. In float64. The rotation is an
    orthogonal matrix to the last bits whatever the spectrum, so the product does not suffer from
    its coming from a Gram matrix.

    Examples
    --------
    >>> left = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> found = principal_components(Factors(left, torch.eye(2)))
    >>> torch.allclose(found.dense(), left.double())
    True
    >>> [round(abs(x), 4) for x in (found.left[0] @ found.right).tolist()]
    [1.0, 0.0]
    """
    left, triangle = torch.linalg.qr(in_float64(factors.left))
    right = triangle @ in_float64(factors.right)
    rotation = torch.linalg.eigh(right @ right.mT).eigenvectors.flip(1)
    return Factors(left=left @ rotation, right=rotation.mT @ right)


def rounding_loss(exact: Factors, rounded: Factors) -> float:
    """Share of the energy of the outputs that rounding both factors costs, on white inputs.

    ``‖L R - L' R'‖² / ‖L R‖²`` in the Frobenius norm, from the Gram matrices of the factors: no
    dense matrix is made, and nothing is taken from something almost equal.

    Parameters
    ----------
    exact, rounded : Factors
        Of the same shapes.

    Returns
    -------
    float
        0.0 if both products are zero.

    Examples
    --------
    >>> exact = Factors(torch.ones(2, 1), torch.tensor([[3.0, 4.0]]))
    >>> rounding_loss(exact, Factors(torch.ones(2, 1), torch.tensor([[3.0, 5.0]])))
    0.04
    """
    left, right = in_float64(exact.left), in_float64(exact.right)
    other_left, other_right = in_float64(rounded.left), in_float64(rounded.right)
    lost = _energy(
        torch.cat([left - other_left, other_left], dim=1),
        torch.cat([right, right - other_right], dim=0),
    )
    return lost / max(_energy(left, right), torch.finfo(torch.float64).tiny)


def _energy(left: Tensor, right: Tensor) -> float:
    return float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0))
