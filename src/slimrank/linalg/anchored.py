"""Wanted: the outputs of the original inputs. Given: the shifted ones (AA-SVD, theorem 3.2)."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from slimrank.linalg.exact import in_float64
from slimrank.linalg.lowrank import Decomposition, Factors, decompose_outputs, output_loss
from slimrank.linalg.moments import Moments
from slimrank.linalg.psd import divide, require_finite


def anchored_loss(
    weight: Float[Tensor, "out in"], factors: Factors, moments: Moments, anchor: float = 1.0
) -> float:
    """Mean of ``‖W a − G z‖²`` with ``a = α x + (1 − α) z`` and ``G = left right``; ridge included.

    Multiplied out it is ``E‖W a‖² − 2 tr W (S + α D) Gᵀ + tr G S Gᵀ``, with ``S = E z zᵀ`` and
    ``D = E (x − z) zᵀ``. The moments are multiplied by matrices of `rank` rows only, so it costs
    less than a product of weight and moment. As with any difference of energies, what is below the
    unit roundoff of ``E‖W a‖²`` is not told apart from zero.

    Parameters
    ----------
    weight : Tensor of shape (out, in)
    factors : Factors
        Of any dtype; the arithmetic is float64.
    moments : Moments
        As for `decompose_anchored`.
    anchor : float
        Share α of the original inputs.

    Raises
    ------
    ValueError
        If the streams differ and the moments tell no energy of the original outputs.
    """
    weight = in_float64(weight.detach())
    assert moments.arriving is not None
    if moments.drift is None or anchor == 0:
        return output_loss(weight, factors, moments.arriving)
    seen, drift = moments.arriving.to(weight), moments.drift.to(weight)
    left, right = in_float64(factors.left), in_float64(factors.right)
    wanted = left.mT @ weight
    given = (left.mT @ left) @ right
    products = (given - 2 * wanted) @ seen
    products -= 2 * anchor * (wanted @ drift)
    energy = _wanted_energy(weight, moments, anchor)
    return max(energy + float((products * right).sum()), 0.0)


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
    target = anchored_target(weight, moments, anchor)
    weight = in_float64(weight.detach())
    assert moments.arriving is not None
    solved = decompose_outputs(target, moments.arriving.to(weight), moments.known_tokens)
    if moments.drift is None or anchor == 0:
        return solved
    return replace(solved, floor=max(_wanted_energy(weight, moments, anchor) - solved.energy, 0.0))


def anchored_target(
    weight: Float[Tensor, "out in"], moments: Moments, anchor: float = 1.0
) -> Float[Tensor, "out in"]:
    """Best map of full rank: ``W + α W D S⁻¹``, in float64; see `decompose_anchored`.

    Raises
    ------
    NumericalError
        If the weight or a moment is not finite.
    """
    seen = moments.arriving
    assert seen is not None
    require_finite(weight, "the weight")
    require_finite(seen, "the second moment")
    weight = in_float64(weight.detach())
    if moments.drift is None or anchor == 0:
        return weight
    require_finite(moments.drift, "the drift")
    carried = weight @ moments.drift.to(weight)
    return weight + anchor * divide(carried, seen.to(weight), moments.known_tokens)


def _wanted_energy(weight: Tensor, moments: Moments, anchor: float) -> float:
    """``E ‖W a‖²``, the ridge's share included; of the original outputs alone if the anchor is 1.

    Otherwise it is ``α² E‖W x‖² + (1 − α²) E‖W z‖² + 2 α (1 − α) tr W D Wᵀ``.
    """
    if moments.original is not None:
        require_finite(moments.original, "the second moment of the original inputs")
        energy = _energy(weight, moments.original)
    elif moments.output_energy is not None:
        energy = moments.output_energy + moments.ridge * float(weight.square().sum())
    else:
        raise ValueError("the anchored loss needs the energy of the original outputs")
    if anchor == 1:
        return energy
    assert moments.arriving is not None
    assert moments.drift is not None
    mixed = (1 - anchor**2) * moments.arriving + 2 * anchor * (1 - anchor) * moments.drift
    return anchor**2 * energy + _energy(weight, mixed)


def _energy(weight: Tensor, moment: Tensor) -> float:
    """``tr W M Wᵀ``."""
    return float(((weight @ moment.to(weight)) * weight).sum())
