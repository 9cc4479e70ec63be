"""What the loss is predicted to do if one component of a weight goes, to first order."""

from jaxtyping import Float, Float64
from torch import Tensor

from slimrank.linalg.exact import in_float64
from slimrank.linalg.lowrank import Decomposition


def predicted_changes(
    solved: Decomposition, gradient: Float[Tensor, "out in"]
) -> Float64[Tensor, " k"]:
    r"""Change of the loss, to first order, for each component that a rank may leave out.

    Component i of the best maps is ``b_i d_iᵀ T``, with the columns of the basis and of its dual.
    Without it the loss changes by

    .. math:: \Delta_i
        = -\left\langle \frac{\partial \ell}{\partial W}, b_i d_i^\top T \right\rangle
        = -b_i^\top \frac{\partial \ell}{\partial W} \, T^\top d_i

    and by the sum for several: the prediction is linear. Of a whitened weight ``W L = Σ σ_i u_i
    v_iᵀ`` the basis is ``u``, its own dual, and ``Wᵀ u_i = σ_i L⁻ᵀ v_i``: so this is Zero Sum SVD's
    ``−σ_i u_iᵀ (∂ℓ/∂W) L⁻ᵀ v_i``, and needs neither the root ``L`` nor its inverse.

    Parameters
    ----------
    solved : Decomposition
        Of the weight, so not of an anchored target; with all of its columns.
    gradient : Tensor of shape (out, in)
        Of the loss by the weight.

    Returns
    -------
    Tensor of shape (k,), float64
        In the unit of the loss, in the order of the basis.

    References
    ----------
    ZS-SVD (arXiv 2602.02848), whose whitened singular values this covers; in a metric on the
    outputs it is our extension.

    Examples
    --------
    >>> import torch
    >>> from slimrank.linalg import decompose_outputs
    >>> solved = decompose_outputs(torch.diag(torch.tensor([2.0, 3.0])))
    >>> predicted_changes(solved, torch.tensor([[1.0, 9.0], [9.0, -1.0]])).tolist()
    [3.0, -2.0]
    """
    basis = solved.basis.to(solved.target)
    dual = basis if solved.dual is None else solved.dual.to(basis)
    changes: Tensor = -((basis.mT @ gradient.to(basis)) * (dual.mT @ solved.target)).sum(dim=1)
    return in_float64(changes)
