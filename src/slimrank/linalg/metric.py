"""The same problem with a metric on the outputs: which errors matter, not only how large they are.

With a metric ``G = H Hᵀ`` the loss is ``E ‖Hᵀ (t − W' z)‖² = tr(G Δ S Δᵀ)``. In the coordinates
``Hᵀ t`` it is the problem of `slimrank.linalg.lowrank` for the map ``Hᵀ T``; going back costs one
triangular solve. If ``G`` is the second moment of the loss gradient at the outputs (K-FAC), half of
that is the rise of the model's loss in nats a token, to second order and as if ``G`` and ``S`` were
independent.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank.errors import NotPositiveDefiniteError
from slimrank.linalg.exact import in_float64
from slimrank.linalg.lowrank import Decomposition, decompose_outputs
from slimrank.linalg.psd import cholesky_with_jitter, require_finite, symmetrize

FAINT = 1e-30  # added where a metric is zero throughout: every error then costs the same


def damped(
    metric: Float[Tensor, "out out"] | Float[Tensor, " out"], relative: float
) -> Float[Tensor, "out out"] | Float[Tensor, " out"]:
    """Add a share of the mean diagonal: ``G + λ mean(diag G) I``.

    A metric of n gradients has rank n at most. Undamped, errors in all other directions of the
    outputs are free: the spectrum ends at rank n, and a map of that rank is called perfect though
    it is so for those n gradients only. Damped, a direction in which no gradient was seen counts as
    λ of the average one, and ranks beyond n go where the outputs have most energy. As λ grows the
    solution becomes that of no metric at all.

    Parameters
    ----------
    metric : Tensor of shape (out, out) or (out,)
        Positive semi-definite, or the diagonal of such a matrix. Not changed.
    relative : float
        λ. A metric that is zero throughout becomes a faint identity, whatever λ.

    Returns
    -------
    Tensor of the shape given, float64, symmetric

    Raises
    ------
    NumericalError
        If the metric is not finite.

    Examples
    --------
    >>> damped(torch.diag(torch.tensor([3.0, 1.0])), 0.5).tolist()
    [[4.0, 0.0], [0.0, 2.0]]
    >>> damped(torch.tensor([3.0, 1.0]), 0.5).tolist()
    [4.0, 2.0]
    """
    require_finite(metric, "the output metric")
    whole = in_float64(metric.detach())
    diagonal = whole if whole.ndim == 1 else whole.diagonal()
    mean = float(diagonal.mean())
    size = relative * mean if mean > 0 else FAINT
    if whole.ndim == 1:
        return whole + size
    raised = symmetrize(whole)
    raised.diagonal().add_(size)
    return raised


def decompose_in_metric(
    target: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"] | None,
    metric: Float[Tensor, "out out"] | Float[Tensor, " out"],
    tokens: int | None = None,
) -> Decomposition:
    """Best maps of every rank where errors of the outputs are measured in a metric.

    With ``B`` the basis of ``Hᵀ T`` the best map of rank r is ``H⁻ᵀ B_r B_rᵀ Hᵀ T``: `basis` is
    ``H⁻ᵀ B`` and `dual` is ``H B``. Any root gives the same map; this one is Cholesky's.

    Parameters
    ----------
    target : Tensor of shape (out, in)
        The map to approximate. Solved in float64 whatever its dtype.
    moment : Tensor of shape (in, in) or None
        Second moment ``S`` of the inputs; the identity if None.
    metric : Tensor of shape (out, out) or (out,)
        Metric ``G``, or its diagonal. Usually `damped`; one that is singular gets a jitter, with a
        warning, and the solution is then the optimum of the metric with the jitter in it.
    tokens : int, optional
        How many tokens the moment is of; see `decompose_outputs`.

    Returns
    -------
    Decomposition
        In float64, with losses in the metric.

    Raises
    ------
    NumericalError
        If the weight, the moment or the metric is not finite.
    NotPositiveDefiniteError
        If the metric has no root, even with the last jitter.

    References
    ----------
    GFWSVD (arXiv 2505.17974): ``L_B⁻ᵀ (L_Bᵀ W L_A)_r L_A⁻¹``; here the root ``L_A`` of ``S`` is
    neither taken nor inverted.

    Examples
    --------
    Output 1 is half as large as output 2 and counts nine times as much, so it is kept first.

    >>> weight = torch.diag(torch.tensor([1.0, 2.0]))
    >>> solved = decompose_in_metric(weight, None, torch.diag(torch.tensor([9.0, 1.0])))
    >>> solved.truncate(1).dense().tolist(), solved.loss(1)
    ([[1.0, 0.0], [0.0, 0.0]], 4.0)
    """
    require_finite(target, "the weight")
    require_finite(metric, "the output metric")
    target, metric = in_float64(target.detach()), metric.detach()
    if metric.ndim == 1:
        scale = _diagonal_root(metric.to(target))
        solved = decompose_outputs(scale * target, moment, tokens)
        basis, dual, jitter = solved.basis / scale, scale * solved.basis, 0.0
    else:
        root, jitter = cholesky_with_jitter(symmetrize(metric.to(target)))
        solved = decompose_outputs(root.mT @ target, moment, tokens)
        basis = torch.linalg.solve_triangular(root.mT, solved.basis, upper=True)
        dual = root @ solved.basis
    return replace(solved, basis=basis, dual=dual, target=target, jitter=jitter)


def _diagonal_root(diagonal: Tensor) -> Tensor:
    """Root of a diagonal metric as a column."""
    if not bool((diagonal > 0).all()):
        raise NotPositiveDefiniteError(
            f"{int((diagonal <= 0).sum())} of {len(diagonal)} outputs have no weight in the "
            "output metric; damp it"
        )
    return diagonal.sqrt()[:, None]
