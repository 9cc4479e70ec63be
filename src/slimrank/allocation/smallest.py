"""What is left of a budget once every linear has its smallest rank."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil

from slimrank.allocation.budget import Budget, LinearShape
from slimrank.allocation.uniform import fixed_params
from slimrank.errors import BudgetError


def beside_smallest(
    shapes: Sequence[LinearShape], budget: Budget, other_params: int, fixed: Mapping[str, int]
) -> tuple[list[LinearShape], int]:
    """Give the linears that may be made smaller, and the parameters left beside their least ranks.

    Fixed ranks are paid, and what no rank makes smaller is paid as dense.

    Raises
    ------
    BudgetError
        If nothing is left; says what share would do.

    Examples
    --------
    Of 57 parameters a takes 16 at rank 1, and the row 8.

    >>> shapes = [LinearShape("a", 8, 8), LinearShape("row", 1, 8)]
    >>> free, left = beside_smallest(shapes, Budget(0.8), 0, {})
    >>> [shape.name for shape in free], left
    (['a'], 33)
    """
    free = [s for s in shapes if s.name not in fixed and budget.smallest_rank <= s.break_even_rank]
    least = fixed_params(shapes, fixed) + sum(s.params(budget.smallest_rank) for s in free)
    names = {shape.name for shape in free}
    least += sum(s.dense_params for s in shapes if s.name not in fixed and s.name not in names)
    left = budget.target_params(shapes, other_params) - least
    if left >= 0:
        return free, left
    total = sum(shape.dense_params for shape in shapes)
    if budget.scope == "model":
        least, total = least + other_params, total + other_params
    share = min(Fraction(ceil(Fraction(least, total) * 10_000), 10_000), Fraction(1))
    beside = " beside what cannot shrink or is fixed" if len(free) < len(shapes) else ""
    raise BudgetError(
        f"keep {budget.param_ratio:g} does not hold rank {budget.smallest_rank} for each linear"
        f"{beside}; the smallest share that works is {float(share):.4f}"
    )
