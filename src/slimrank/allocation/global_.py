"""Ranks across a whole model at once, any linear free to stay dense."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from slimrank.allocation.budget import Budget, LinearShape, RankPlan, require_fixed
from slimrank.allocation.fill import Curve, fill, rank_costs
from slimrank.allocation.smallest import beside_smallest
from slimrank.errors import NumericalError


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """A plan, what it loses, and what a parameter more would be worth.

    Parameters
    ----------
    plan : RankPlan
    predicted_loss : float
        Sum of the losses over dense, in the unit of the curves; fixed ranks are not counted.
    marginal : float
        Loss that one more parameter would save, from the first move that did not fit: the Lagrange
        multiplier. 0 if nothing is left to save.
    """

    plan: RankPlan
    predicted_loss: float
    marginal: float


def allocate_global(
    shapes: Sequence[LinearShape],
    losses: Mapping[str, Tensor],
    budget: Budget,
    other_params: int = 0,
    *,
    fixed: Mapping[str, int] | None = None,
    may_stay_dense: bool = True,
) -> GlobalPlan:
    r"""Choose for every linear a rank, or to stay dense, so that the sum of the losses is least.

    Every linear has a curve of points: what it costs and loses at each rank that is allowed (a
    multiple, not below the smallest, below break-even), and dense, at its whole cost and loss 0.
    All start at their smallest rank; then the lower convex hulls of the curves are climbed in order
    of gain per parameter, until the budget is spent (see `slimrank.allocation.fill`). For some λ,
    the worth of the last edge, the plan minimises

    .. math:: \sum_m L_m(r_m) + \lambda \, \text{params}_m(r_m)

    and so loses least of all plans that cost no more than it does. What is left when an edge does
    not fit goes to the best smaller moves; the loss is then above the optimum by less than that
    edge gains. A larger budget never leaves a larger loss, though a single rank may be smaller.

    Losses must be in one unit for all linears: what is best is best for their sum.

    Parameters
    ----------
    shapes : sequence of LinearShape
        The targeted linears.
    losses : mapping of str to Tensor of shape (min(out, in) + 1,), float64
        Loss at rank 0, 1, ..., in excess of what dense loses: never below 0, never rising. Where a
        method's losses have a floor that dense would have too (an anchored objective), it must have
        been subtracted. Not looked at where the rank is fixed or no rank makes the linear smaller.
    budget : Budget
    other_params : int
        Parameters of the model outside the targets, for scope 'model'.
    fixed : mapping of str to int, optional
        Ranks decided elsewhere, paid first and returned as they are; see `uniform`.
    may_stay_dense : bool
        Whether a linear that some rank makes smaller may be left as it is. If not, all such are
        factorised, unless the budget holds everything dense.

    Returns
    -------
    GlobalPlan
        Within the budget, with the one exception of `uniform`: at `param_ratio` 1 all that is not
        fixed stays dense.

    Raises
    ------
    BudgetError
        If the smallest ranks are over the budget; says what share would do. If a fixed rank is out
        of its bounds or of no linear.
    NumericalError
        If a loss is not finite.
    ValueError
        If losses are too few, rise with the rank, or are negative.

    Notes
    -----
    In neither paper: Swift-SVD shares ranks out within one kind of matrix, AA-SVD gives each the
    same ratio. ARA (arXiv 2510.19389) showed what it is worth to leave some linears dense.

    Examples
    --------
    Of 128 parameters 83 may be kept. Dense, a costs 48 more than at rank 1 and saves 7; the second
    rank of b saves 1 for 16.

    >>> shapes = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]
    >>> flat = torch.arange(8, -1, -1, dtype=torch.float64)
    >>> steep = torch.tensor([9.0, 1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    >>> found = allocate_global(shapes, {"a": flat, "b": steep}, Budget(0.65))
    >>> dict(found.plan.ranks), found.predicted_loss
    ({'a': None, 'b': 1}, 1.0)
    """
    fixed = fixed or {}
    require_fixed(shapes, fixed)
    ranks: dict[str, int | None] = {s.name: fixed.get(s.name) for s in shapes}
    predicted = marginal = 0.0
    whole = RankPlan(ranks).params(shapes)
    if budget.param_ratio < 1 and whole > budget.target_params(shapes, other_params):
        free, left = beside_smallest(shapes, budget, other_params, fixed)
        curves = [_curve(s, losses[s.name], budget, may_stay_dense) for s in free]
        taken, marginal = fill(curves, left)
        for shape, curve, steps in zip(free, curves, taken, strict=True):
            if may_stay_dense and steps == len(curve.costs):
                continue
            rank = budget.smallest_rank + steps * budget.multiple_of
            ranks[shape.name] = rank
            predicted += float(losses[shape.name][rank])
    plan = RankPlan(ranks)
    plan.check(shapes, budget, other_params, fixed)
    return GlobalPlan(plan, predicted, marginal)


def _curve(
    shape: LinearShape,
    losses: Float64[Tensor, " ranks_plus_1"],
    budget: Budget,
    may_stay_dense: bool,
) -> Curve:
    """Steps from the smallest rank to the largest below break-even, and on to dense."""
    if len(losses) != shape.full_rank + 1:
        raise ValueError(
            f"{shape.name}: losses at {shape.full_rank + 1} ranks are needed, from 0 on, not at "
            f"{len(losses)}"
        )
    if not bool(losses.isfinite().all()):
        raise NumericalError(f"{shape.name}: its losses are not finite; calibrate again")
    if bool((losses.diff() > 0).any()) or float(losses[-1]) < 0:
        raise ValueError(
            f"{shape.name}: losses over dense must not rise with rank, nor be negative"
        )
    smallest, step = budget.smallest_rank, budget.multiple_of
    largest = shape.break_even_rank // step * step
    costs = rank_costs(shape, smallest, largest, step)
    at_ranks = losses[smallest : largest + 1 : step]
    if may_stay_dense:
        costs = np.append(costs, shape.dense_params - shape.params(largest))
        at_ranks = torch.cat([at_ranks, at_ranks.new_zeros(1)])
    return Curve(costs, -at_ranks.diff().cpu().numpy())
