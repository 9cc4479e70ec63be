"""The same share of every linear, each rank from the linear's own shape."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from slimrank.allocation.budget import Budget, LinearShape, RankPlan
from slimrank.errors import BudgetError


def uniform(shapes: Sequence[LinearShape], budget: Budget, other_params: int = 0) -> RankPlan:
    """Give every linear the same share of its parameters.

    The rank is ``⌊ρ · out · in / (out + in)⌋``, in whole numbers. A linear that no rank makes
    smaller stays dense; it frees nothing, so the others share what is left and the sum stays within
    the budget. At ρ = 1 everything stays dense.

    Parameters
    ----------
    shapes : sequence of LinearShape
        The targeted linears.
    budget : Budget
    other_params : int
        Parameters of the model outside the targets, for scope 'model'.

    Returns
    -------
    RankPlan
        Never over the budget, and less than one step of rank per linear under it.

    Raises
    ------
    BudgetError
        If a linear's share is below its smallest rank; says what share would do.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), section 4, and AA-SVD (arXiv 2604.02119), appendix B: one ratio
    for each matrix.

    Examples
    --------
    >>> shapes = [LinearShape("q", 576, 576), LinearShape("k", 192, 576)]
    >>> dict(uniform(shapes, Budget(0.8)).ranks)
    {'q': 230, 'k': 115}
    """
    allowed = budget.allowance(shapes, other_params)
    step, smallest = budget.multiple_of, budget.smallest_rank
    shrinkable = [s for s in shapes if smallest <= s.break_even_rank]
    size = sum(s.dense_params for s in shrinkable)
    stays = sum(s.dense_params for s in shapes) - size
    share = (allowed - stays) / size if size else Fraction(1)
    if share >= 1:
        if stays > allowed:
            raise BudgetError(_too_small(budget, shapes, other_params))
        return RankPlan({s.name: None for s in shapes})
    ranks: dict[str, int | None] = dict.fromkeys((s.name for s in shapes), None)
    for shape in shrinkable:
        most = share * shape.dense_params / shape.params_per_rank
        ranks[shape.name] = int(most) // step * step
        if most < smallest:
            raise BudgetError(_too_small(budget, shapes, other_params, shape.name))
    plan = RankPlan(ranks)
    plan.check(shapes, budget, other_params)
    return plan


def _too_small(
    budget: Budget, shapes: Sequence[LinearShape], other_params: int, name: str | None = None
) -> str:
    """Say what share the smallest ranks would need."""
    smallest = budget.smallest_rank
    need = Fraction(0)
    stays = 0
    for shape in shapes:
        if smallest <= shape.break_even_rank:
            need = max(need, Fraction(smallest * shape.params_per_rank, shape.dense_params))
        else:
            stays += shape.dense_params
    size = sum(shape.dense_params for shape in shapes)
    least = stays + need * (size - stays)
    total = size
    if budget.scope == "model":
        least, total = least + other_params, size + other_params
    where = f" ({name} is the first)" if name else ""
    return (
        f"keep {budget.param_ratio:g} is below rank {smallest} for some linear{where}; "
        f"the smallest share that works is {ceil(least / total * 10_000) / 10_000:.4f}"
    )
