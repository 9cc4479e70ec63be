"""Ranks within one block, step by step to whom a parameter helps most."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from slimrank.allocation.budget import Budget, LinearShape, require_fixed
from slimrank.allocation.fill import Curve, fill, rank_costs
from slimrank.allocation.uniform import fixed_params
from slimrank.errors import BudgetError, NumericalError


def greedy(
    shapes: Sequence[LinearShape],
    spectra: Mapping[str, Tensor],
    weights: Mapping[str, float],
    params: int,
    *,
    multiple_of: int = 1,
    min_rank: int = 1,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    r"""Share a block's parameters out among its linears by marginal gain per parameter.

    The loss to be made small is ``Σ_m w_m Σ_{j > r_m} σ²_{m,j}``. Every linear starts at the
    smallest rank, and `multiple_of` more ranks of linear m, from r on, are worth

    .. math:: \frac{w_m \sum_{j=r+1}^{r+s} \sigma_{m,j}^2}
        {\text{params}_m(r + s) - \text{params}_m(r)}

    a parameter. Steps are taken in order of that worth; one that no longer fits is passed over, and
    cheaper ones behind it may still be taken. Steps of equal worth go to the smaller rank first,
    then by order of shapes.

    In the plain layout every step of a linear costs the same, and singular values fall: steps are
    worth less and less. In the pivoted one steps cost less and less, and may be worth more than
    those before them; then they are taken together, as edges of a lower hull (see
    `slimrank.allocation.fill`, which has the proofs). Up to the first edge that is passed over the
    result is optimal, and so all of it where steps cost the same; otherwise it is short of the
    optimum by no more than that one edge gains. A larger budget never leaves a larger loss, though
    a single rank may be smaller.

    Parameters
    ----------
    shapes : sequence of LinearShape
        The block's linears that are factorised; none that is to stay dense.
    spectra : mapping of str to Tensor of shape (min(out, in),)
        Singular values, descending: squares are mean energy per token (see
        `slimrank.linalg.Decomposition`). Not looked at where the rank is fixed.
    weights : mapping of str to float
        What a unit of each linear's loss counts, at least 0; see
        `slimrank.calibration.output_sensitivity`. Not looked at where the rank is fixed. A linear
        of weight 0 gets more than the smallest rank only of what would gain no other anything.
    params : int
        Parameters that all of them may hold together.
    multiple_of : int
        Every rank is a multiple of this.
    min_rank : int
        No rank is below this.
    fixed : mapping of str to int, optional
        Ranks decided elsewhere, paid first and returned as they are; see `uniform`.

    Returns
    -------
    dict of str to int
        In order of shapes, at `params` or below. No rank that is not fixed passes break-even, which
        lies below ``min(out, in)``; if all are there, the rest of `params` is left over.

    Raises
    ------
    BudgetError
        If the smallest ranks and the fixed ones are over `params`, or the smallest rank of a linear
        does not make it smaller. If a fixed rank is out of its bounds or of no linear.
    NumericalError
        If a weight or a singular value is not finite.
    ValueError
        If a weight is negative, or a spectrum has the wrong length or does not descend.

    Notes
    -----
    In neither paper. AA-SVD (arXiv 2604.02119) gives each matrix the same ratio and leaves other
    ranks to future work; Swift-SVD (arXiv 2604.01609, algorithm 2) shares ranks out across blocks
    before anything is compressed, in proportion to scores and within one kind of matrix only. Here
    the spectra may be those of the shifted inputs, and matrices of all kinds compete.

    Examples
    --------
    A rank costs 16. Both start at rank 1 and two steps are left: a's next ones gain 9 and 4, b's
    gain 1 and 0.

    >>> import torch
    >>> shapes = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]
    >>> spectra = {
    ...     "a": torch.tensor([4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]),
    ...     "b": torch.tensor([3.0, 1.0, 0, 0, 0, 0, 0, 0]),
    ... }
    >>> greedy(shapes, spectra, {"a": 1.0, "b": 1.0}, params=64)
    {'a': 3, 'b': 1}
    >>> greedy(shapes, spectra, {"a": 1.0, "b": 5.0}, params=64)
    {'a': 2, 'b': 2}
    """
    fixed = fixed or {}
    require_fixed(shapes, fixed)
    smallest = Budget(1.0, multiple_of=multiple_of, min_rank=min_rank).smallest_rank
    ranks = {shape.name: fixed.get(shape.name, smallest) for shape in shapes}
    left = params - sum(shape.params(ranks[shape.name]) for shape in shapes)
    if left < 0:
        raise BudgetError(_too_small(shapes, params, smallest, fixed))
    free = [shape for shape in shapes if shape.name not in fixed]
    curves = []
    for shape in free:
        _check(shape, spectra[shape.name], weights[shape.name], smallest)
        largest = shape.break_even_rank // multiple_of * multiple_of
        squares = spectra[shape.name][smallest:largest].double().square()
        gains = weights[shape.name] * squares.reshape(-1, multiple_of).sum(1)
        costs = rank_costs(shape, smallest, largest, multiple_of)
        curves.append(Curve(costs, gains.cpu().numpy()))
    taken, _ = fill(curves, left)
    for shape, steps in zip(free, taken, strict=True):
        ranks[shape.name] += steps * multiple_of
    return ranks


def _check(shape: LinearShape, values: Tensor, weight: float, smallest: int) -> None:
    """Refuse what no order of steps can be told from."""
    name, side = shape.name, shape.full_rank
    if smallest > shape.break_even_rank:
        raise BudgetError(
            f"{name}: rank {smallest} does not make a linear of {shape.out_features} x "
            f"{shape.in_features} smaller; leave it dense"
        )
    if values.shape != (side,):
        raise ValueError(f"{name}: a spectrum of {side} values is needed, not {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise NumericalError(f"{name}: its spectrum is not finite; calibrate again")
    if bool((values.diff() > 0).any()):
        raise ValueError(f"{name}: singular values must descend")
    if not math.isfinite(weight):
        raise NumericalError(f"{name}: its weight in the block is not finite; calibrate again")
    if weight < 0:
        raise ValueError(f"{name}: its weight in the block is negative: {weight:g}")


def _too_small(
    shapes: Sequence[LinearShape], params: int, smallest: int, fixed: Mapping[str, int]
) -> str:
    """Say how many parameters the smallest ranks need."""
    held = fixed_params(shapes, fixed)
    free = [shape for shape in shapes if shape.name not in fixed]
    need = sum(shape.params(smallest) for shape in free)
    others = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
    beside = f" beside {held} of fixed ranks" if fixed else ""
    return (
        f"{shapes[0].name}{others}: {params} parameters do not hold rank {smallest} for each, "
        f"which takes {need}{beside}; keep more"
    )
