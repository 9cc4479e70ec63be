"""The sign rule for singular vectors, so that results compare across solvers and machines."""

from jaxtyping import Float
from torch import Tensor


def fix_signs(basis: Float[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
    """Turn each column so that its entry of largest size is positive.

    Parameters
    ----------
    basis : Tensor of shape (rows, k)
        Columns that are known up to their sign.

    Returns
    -------
    Tensor of shape (rows, k)
        The same columns, each times +1 or -1.

    Examples
    --------
    >>> import torch
    >>> fix_signs(torch.tensor([[0.6, -0.8], [-0.8, 0.6]]))
    tensor([[-0.6000,  0.8000],
            [ 0.8000, -0.6000]])
    """
    largest = basis.abs().argmax(dim=0, keepdim=True)
    signs = basis.gather(0, largest).sign()
    signs[signs == 0] = 1
    return basis * signs
