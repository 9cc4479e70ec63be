"""Wanted: the outputs of the original inputs. Given: the shifted ones (AA-SVD, theorem 3.2)."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from slimrank.linalg.lowrank import Decomposition, Factors, decompose_outputs, output_loss
from slimrank.linalg.moments import Moments
from slimrank.linalg.psd import divide, require_finite, symmetrize


def anchored_loss(
    weight: Float[Tensor, "out in"], factors: Factors, moments: Moments, anchor: float = 1.0
) -> float:
    """Mean of ``‖W a − left right z‖²`` with ``a = α x + (1 − α) z``, and the ridge's share.

    With ``d = x − z`` and ``Δ = W − left right`` it is ``tr Δ S Δᵀ + 2 α tr W D Δᵀ + α² E‖W d‖²``.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    factors : Factors
        Of any dtype; the arithmetic is float64.
    moments : Moments
    anchor : float
        Share α of the original inputs.
    """
    weight = weight.detach().double()
    assert moments.arriving is not None
    plain = output_loss(weight, factors, moments.arriving)
    if moments.drift is None or anchor == 0:
        return plain
    gap = weight - factors.left.double() @ factors.right.double()
    carried = weight @ moments.drift.to(weight)
    spread = _spread(weight, moments, carried)
    return max(plain + 2 * anchor * float((carried * gap).sum()) + anchor**2 * spread, 0.0)


def decompose_anchored(
    weight: Float[Tensor, "out in"], moments: Moments, anchor: float = 1.0
) -> Decomposition:
    """Best maps for the shifted inputs that reproduce the outputs of the original ones.

    The best map of full rank is ``T = W + α W D S⁻¹`` with ``S = E z zᵀ`` and ``D = E (x − z) zᵀ``;
    that is AA-SVD's ``W C S⁻¹``, written so that equal streams give ``W``. From there it is the
    inverse-free route.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    moments : Moments
        With a drift; without one the streams agree. With `original` or `output_energy`, which the
        floor of the loss is told from.
    anchor : float
        Share α of the original inputs in the target; 0 is the shift-aware objective.

    Returns
    -------
    Decomposition
        In float64, with the floor ``E‖W a‖² − tr T S Tᵀ``.

    Raises
    ------
    NumericalError
        If the weight or a moment is not finite.

    References
    ----------
    AA-SVD (arXiv 2604.02119), theorem 3.2; with Swift-SVD's route in the place of its roots.

    Examples
    --------
    The inputs have shrunk to a half, so the best map doubles the weight.

    >>> import torch
    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> moments = Moments(original=4 * eye, tokens=9, shifted=eye, drift=eye)
    >>> solved = decompose_anchored(torch.diag(torch.tensor([3.0, 1.0])), moments)
    >>> solved.truncate(1).dense().tolist(), solved.loss(1), solved.floor
    ([[6.0, 0.0], [0.0, 0.0]], 4.0, 0.0)
    """
    seen = moments.arriving
    assert seen is not None
    require_finite(weight, "the weight")
    require_finite(seen, "the second moment")
    weight = weight.detach().double()
    if moments.drift is None or anchor == 0:
        return decompose_outputs(weight, seen, moments.known_tokens)
    require_finite(moments.drift, "the drift")
    seen = symmetrize(seen.to(weight))
    carried = weight @ moments.drift.to(weight)
    target = weight + anchor * divide(carried, seen, moments.known_tokens)
    solved = decompose_outputs(target, seen, moments.known_tokens)
    energy = float(((weight @ seen) * weight).sum()) + 2 * anchor * float((carried * weight).sum())
    energy += anchor**2 * _spread(weight, moments, carried)
    return replace(solved, floor=max(energy - solved.energy, 0.0))


def _spread(weight: Tensor, moments: Moments, carried: Tensor) -> float:
    """``E ‖W (x − z)‖²``; ``carried`` is ``W D``."""
    assert moments.arriving is not None
    if moments.original is not None:
        require_finite(moments.original, "the second moment of the original inputs")
        seen = moments.original.to(weight)
        energy = float(((weight @ seen) * weight).sum())
    elif moments.output_energy is not None:
        energy = moments.output_energy + moments.ridge * float(weight.square().sum())
    else:
        raise ValueError("the anchored loss needs the energy of the original outputs")
    shifted = moments.arriving.to(weight)
    apart = energy - float(((weight @ shifted) * weight).sum())
    return max(apart - 2 * float((carried * weight).sum()), 0.0)
