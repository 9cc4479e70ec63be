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
    return (matrix + matrix.mT).div_(2)


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


def divide(
    matrix: Float[Tensor, "m n"], moment: Float[Tensor, "n n"], tokens: int | None = None
) -> Float[Tensor, "m n"]:
    """``matrix @ moment⁻¹``, or by a pseudo-inverse where the moment is singular.

    The moment is first scaled to a unit diagonal, which takes care of features of very different
    size; a feature that is always zero is left out, and gets zero. A moment that is singular in
    float64, or of fewer tokens than features, is inverted on its range only.

    Parameters
    ----------
    matrix : Tensor of shape (m, n)
    moment : Tensor of shape (n, n)
        Positive semi-definite, float64.
    tokens : int, optional
        How many tokens the moment is of: its rank is no larger.

    Raises
    ------
    NumericalError
        If the moment is not finite.

    Examples
    --------
    >>> moment = torch.diag(torch.tensor([4.0, 0.0]).double())
    >>> divide(torch.ones(1, 2, dtype=torch.float64), moment).tolist()
    [[0.25, 0.0]]
    """
    require_finite(moment, "the second moment")
    diagonal = moment.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    alive = int((scale > 0).sum())
    scaled = moment * scale[:, None] * scale
    scaled.diagonal()[scale == 0] = 1.0
    rounding = 4 * len(moment) * torch.finfo(moment.dtype).eps
    root, info = torch.linalg.cholesky_ex(scaled)
    if (tokens is None or tokens >= alive) and int(info) == 0:
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        inverse_root = torch.linalg.solve_triangular(root, eye, upper=False)
        if float(inverse_root.square().sum()) * rounding < 1:  # a pivot may hide it, this cannot
            solved: Tensor = torch.cholesky_solve((matrix * scale).mT, root).mT * scale
            return solved
    scaled.diagonal()[scale == 0] = 0.0
    values, vectors = torch.linalg.eigh(scaled)
    known = values > rounding * values[-1]
    if tokens is not None and tokens < len(values):
        known[: len(values) - tokens] = False
    inverse = torch.where(known, values, torch.inf).reciprocal()
    on_range: Tensor = ((matrix * scale) @ vectors * inverse) @ vectors.mT * scale
    return on_range
