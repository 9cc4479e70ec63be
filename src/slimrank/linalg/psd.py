"""Roots of positive semi-definite matrices, in float64, with failures told by name."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank.errors import NotPositiveDefiniteError, NumericalError, NumericalWarning

JITTER_START = 1e-14
JITTER_STEPS = 9


def symmetrize(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Average a matrix with its transpose.

    Examples
    --------
    >>> symmetrize(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    return (matrix + matrix.mT) / 2


def require_finite(matrix: Tensor, what: str) -> None:
    """Raise if any entry is NaN or infinite.

    Raises
    ------
    NumericalError
        With the number of bad entries.
    """
    if not torch.isfinite(matrix).all():
        bad = int((~torch.isfinite(matrix)).sum())
        raise NumericalError(f"{what} holds {bad} entries that are NaN or infinite")


def cholesky_with_jitter(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], float]:
    """Lower Cholesky root, with a growing multiple of the mean diagonal added if it is needed.

    Parameters
    ----------
    matrix : Tensor of shape (n, n)
        Symmetric, float64.

    Returns
    -------
    root : Tensor of shape (n, n)
        ``root @ root.mT`` equals ``matrix + jitter * I``.
    jitter : float
        What was added to the diagonal; 0.0 if nothing was.

    Raises
    ------
    NumericalError
        If the matrix is not finite.
    NotPositiveDefiniteError
        If it has no root after the last jitter, 1e-6 of the mean diagonal.

    Warns
    -----
    NumericalWarning
        If a jitter was added, with its size.

    Examples
    --------
    >>> root, jitter = cholesky_with_jitter(torch.diag(torch.tensor([4.0, 9.0]).double()))
    >>> root.diag().tolist(), jitter
    ([2.0, 3.0], 0.0)
    """
    require_finite(matrix, "the second moment")
    scale = float(matrix.diagonal().mean())
    jitters = [0.0] + [scale * JITTER_START * 10**step for step in range(JITTER_STEPS)]
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for jitter in jitters:
        root: Tensor
        root, info = torch.linalg.cholesky_ex(matrix + jitter * eye)
        if int(info) == 0:
            if jitter > 0:
                warnings.warn(
                    f"a second moment of size {matrix.shape[0]} is singular; added "
                    f"{jitter / scale:.0e} of its mean diagonal to take a Cholesky root",
                    NumericalWarning,
                    stacklevel=2,
                )
            return root, jitter
    raise NotPositiveDefiniteError(
        f"a second moment of size {matrix.shape[0]} has no Cholesky root, even with "
        f"{jitters[-1]:.1e} added to its diagonal; the method 'swift-svd' needs no root"
    )


def symmetric_root(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Root ``R`` with ``R @ R.mT`` equal to a positive semi-definite matrix, singular or not.

    The columns are eigenvectors times the root of their eigenvalues. Rounding leaves negative
    eigenvalues of the size of the unit roundoff; they are taken as zero.

    Raises
    ------
    NumericalError
        If the matrix is not finite.

    Examples
    --------
    >>> root = symmetric_root(torch.diag(torch.tensor([4.0, 0.0]).double()))
    >>> (root @ root.mT).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    require_finite(matrix, "the second moment")
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    root: Tensor = eigenvectors * eigenvalues.clamp_min(0).sqrt()
    return root
