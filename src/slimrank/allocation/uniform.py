"""The same share of every linear, each rank from the linear's own shape."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil

from slimrank.allocation.budget import Budget, LinearShape, RankPlan, require_fixed
from slimrank.errors import BudgetError


def uniform(
    shapes: Sequence[LinearShape],
    budget: Budget,
    other_params: int = 0,
    fixed: Mapping[str, int] | None = None,
) -> RankPlan:
    """Give every linear the same share of its parameters.

    The rank is the largest within ``ρ · out · in`` parameters: ``⌊ρ · out · in / (out + in)⌋`` in
    the plain layout, more in the pivoted one (see `LinearShape`). A linear that no rank makes
    smaller stays dense; it frees nothing, so the others share what is left and the sum stays within
    the budget. At ρ = 1 everything stays dense.

    Ranks that are fixed are paid first, even where that is more than dense, and the others share
    what is left by the same rule: their share is larger or smaller than ρ, and from 1 on they stay
    dense. At ρ = 1 they stay dense whatever the fixed ones cost. That is the one case where the sum
    may be over the budget: by what the fixed ones cost over dense.

    Parameters
    ----------
    shapes : sequence of LinearShape
        The targeted linears.
    budget : Budget
    other_params : int
        Parameters of the model outside the targets, for scope 'model'.
    fixed : mapping of str to int, optional
        Ranks of some of the linears, decided elsewhere and returned as they are, within 1 and
        ``min(out, in)``; `multiple_of` and `min_rank` do not touch them.

    Returns
    -------
    RankPlan
        Within the budget, but for the case above; and less than one step of rank per linear under
        it, unless all that is not fixed stays dense.

    Raises
    ------
    BudgetError
        If a linear's share is below its smallest rank, or the fixed ranks alone are over the
        budget; says what share would do. If a fixed rank is out of its bounds or of no linear.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), section 4, and AA-SVD (arXiv 2604.02119), appendix B: one ratio
    for each matrix.

    Examples
    --------
    >>> shapes = [LinearShape("q", 576, 576), LinearShape("k", 192, 576)]
    >>> dict(uniform(shapes, Budget(0.8)).ranks)
    {'q': 230, 'k': 115}
    >>> dict(uniform(shapes, Budget(0.8), fixed={"k": 160}).ranks)
    {'q': 200, 'k': 160}
    >>> pivoted = [LinearShape("q", 576, 576, layout="auto")]
    >>> dict(uniform(pivoted, Budget(0.8)).ranks)
    {'q': 317}
    """
    fixed = fixed or {}
    require_fixed(shapes, fixed)
    step, smallest = budget.multiple_of, budget.smallest_rank
    free = [s for s in shapes if s.name not in fixed]
    shrinkable = [s for s in free if smallest <= s.break_even_rank]
    size = sum(s.dense_params for s in shrinkable)
    stays = sum(s.dense_params for s in free) - size + fixed_params(shapes, fixed)
    allowed = budget.allowance(shapes, other_params)
    ranks: dict[str, int | None] = {s.name: fixed.get(s.name) for s in shapes}
    if budget.param_ratio < 1 and stays + size > allowed:
        if not size:
            raise BudgetError(_too_small(budget, shapes, other_params, fixed))
        share = (allowed - stays) / size
        for shape in shrinkable:
            most = shape.largest_rank(int(share * shape.dense_params))
            ranks[shape.name] = most // step * step
            if most < smallest:
                raise BudgetError(_too_small(budget, shapes, other_params, fixed, shape.name))
    plan = RankPlan(ranks)
    plan.check(shapes, budget, other_params, fixed)
    return plan


def fixed_params(shapes: Sequence[LinearShape], fixed: Mapping[str, int]) -> int:
    """Parameters that the fixed ranks cost."""
    return sum(s.params(fixed[s.name]) for s in shapes if s.name in fixed)


def _too_small(
    budget: Budget,
    shapes: Sequence[LinearShape],
    other_params: int,
    fixed: Mapping[str, int],
    name: str | None = None,
) -> str:
    """Say what share the smallest ranks would need."""
    smallest = budget.smallest_rank
    need = Fraction(0)
    shrinks = 0
    stays = fixed_params(shapes, fixed)
    for shape in shapes:
        if shape.name in fixed:
            continue
        if smallest <= shape.break_even_rank:
            need = max(need, Fraction(shape.params(smallest), shape.dense_params))
            shrinks += shape.dense_params
        else:
            stays += shape.dense_params
    least = stays + need * shrinks
    total = sum(shape.dense_params for shape in shapes)
    if budget.scope == "model":
        least, total = least + other_params, total + other_params
    share = min(Fraction(ceil(least / total * 10_000), 10_000), Fraction(1))
    where = f" ({name} is the first)" if name else ""
    if fixed:
        others = f" and {len(fixed) - 1} more" if len(fixed) > 1 else ""
        allowed = budget.target_params(shapes, other_params)
        where += (
            f": the fixed ranks ({next(iter(fixed))}{others}) take "
            f"{fixed_params(shapes, fixed)} of the {allowed} parameters that it allows"
        )
    what = f"below rank {smallest} for some linear" if name or not fixed else "too little"
    return (
        f"keep {budget.param_ratio:g} is {what}{where}; "
        f"the smallest share that works is {float(share):.4f}"
    )
