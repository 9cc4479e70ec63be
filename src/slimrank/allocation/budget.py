"""How much to keep, in whole parameters: the only place where it is said."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Final, Literal

from slimrank.errors import BudgetError

Scope = Literal["targets", "model"]
Layout = Literal["plain", "pivoted", "auto"]

PIVOT_PARAMS: Final = 2
"""Parameters that a pivot counts: four bytes of int32, two parameters in 16-bit storage.

In float32 storage that is one too many, so no budget is exceeded in bytes either.
"""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """The sides of one linear, the layout of its factors, and what they make of ranks.

    A rank r costs ``r (out + in)`` parameters in the plain layout: two thin factors. The pivoted
    one leaves out those rows of the second factor that are rows of the identity, and says which
    they are: ``r (out + in - r)`` and `PIVOT_PARAMS` for each pivot. It is the cheaper one from
    rank 3 on. Layout 'auto' is at each rank the cheaper of both, and plain where they cost alike.

    References
    ----------
    PIFA (arXiv 2501.19090): the pivoted layout.

    Examples
    --------
    Of 192 x 576, rank 100 costs 100 x 768, or 100 x 668 and 200 for the pivots.

    >>> shape = LinearShape("k_proj", out_features=192, in_features=576)
    >>> shape.dense_params, shape.params(100), shape.break_even_rank
    (110592, 76800, 143)
    >>> pivoted = LinearShape("k_proj", 192, 576, layout="pivoted")
    >>> pivoted.params(100), pivoted.break_even_rank
    (67000, 191)
    >>> shape.largest_rank(76800), pivoted.largest_rank(76800)
    (100, 117)
    """

    name: str
    out_features: int
    in_features: int
    layout: Layout = "plain"

    @property
    def dense_params(self) -> int:
        """Parameters of the matrix itself; a bias is kept and never counted."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """Largest rank that a matrix of these sides can have."""
        return min(self.out_features, self.in_features)

    @property
    def break_even_rank(self) -> int:
        """Largest rank whose factors cost less than the matrix; may be 0."""
        return self.largest_rank(self.dense_params - 1)

    def is_pivoted(self, rank: int) -> bool:
        """Whether the factors of a rank are in the pivoted layout.

        Examples
        --------
        >>> [LinearShape("q", 8, 8, layout="auto").is_pivoted(rank) for rank in (1, 2, 3)]
        [False, False, True]
        """
        if self.layout == "auto":
            return self._pivoted_params(rank) < self._plain_params(rank)
        return self.layout == "pivoted"

    def params(self, rank: int | None) -> int:
        """Parameters at a rank; None is dense."""
        if rank is None:
            return self.dense_params
        return self._pivoted_params(rank) if self.is_pivoted(rank) else self._plain_params(rank)

    def largest_rank(self, params: int) -> int:
        """Largest rank within so many parameters; 0 if there is none, at most `full_rank`.

        Costs rise with the rank up to there, in any layout.
        """
        if params < 0:
            return 0
        plain = params // (self.out_features + self.in_features)
        # r (m - r) <= p where (m - 2 r)^2 >= m^2 - 4 p
        most = self.out_features + self.in_features + PIVOT_PARAMS
        square = most**2 - 4 * params
        pivoted = (most - isqrt(square - 1) - 1) // 2 if square > 0 else self.full_rank
        found = {"plain": plain, "pivoted": pivoted, "auto": max(plain, pivoted)}
        return min(found[self.layout], self.full_rank)

    def _plain_params(self, rank: int) -> int:
        return rank * (self.out_features + self.in_features)

    def _pivoted_params(self, rank: int) -> int:
        return rank * (self.out_features + self.in_features - rank + PIVOT_PARAMS)


@dataclass(frozen=True, slots=True)
class Budget:
    """Share of parameters to keep, and of what.

    Parameters
    ----------
    param_ratio : float
        Parameters kept over parameters before, in (0, 1].
    scope : {'targets', 'model'}
        Of the targeted linears (the convention of the papers), or of everything in the model,
        embeddings and head included.
    multiple_of : int
        Every rank is a multiple of this.
    min_rank : int
        No rank is below this.

    Raises
    ------
    BudgetError
        If a value is out of its range.
    """

    param_ratio: float
    scope: Scope = "targets"
    multiple_of: int = 1
    min_rank: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.param_ratio <= 1:
            raise BudgetError(
                f"keep is the share of parameters that stay and lies in (0, 1], not "
                f"{self.param_ratio:g}; 0.8 keeps 80 %"
            )
        if self.multiple_of < 1 or self.min_rank < 1:
            raise BudgetError("multiple_of and min_rank are at least 1")

    @property
    def smallest_rank(self) -> int:
        """Smallest rank that respects both `min_rank` and `multiple_of`."""
        return -(-self.min_rank // self.multiple_of) * self.multiple_of

    def target_params(self, shapes: Sequence[LinearShape], other_params: int) -> int:
        """Whole parameters that the targeted linears may hold; see `allowance`."""
        return int(self.allowance(shapes, other_params))

    def allowance(self, shapes: Sequence[LinearShape], other_params: int) -> Fraction:
        """Parameters that the targeted linears may hold, not yet rounded down.

        Parameters
        ----------
        shapes : sequence of LinearShape
            The targeted linears.
        other_params : int
            Parameters of the model outside them, which stay; looked at in scope 'model' only.

        Raises
        ------
        BudgetError
            In scope 'model', if what stays is more than the budget.

        Examples
        --------
        >>> Budget(0.7).allowance([LinearShape("a", 10, 10)], other_params=50)
        Fraction(70, 1)
        >>> Budget(0.7, scope="model").allowance([LinearShape("a", 10, 10)], other_params=50)
        Fraction(55, 1)
        """
        share = Fraction(str(self.param_ratio))
        targeted = sum(shape.dense_params for shape in shapes)
        if self.scope == "targets":
            return share * targeted
        allowed = share * (targeted + other_params) - other_params
        if allowed < 1:
            least = other_params / (targeted + other_params)
            raise BudgetError(
                f"keep {self.param_ratio:g} of the model is less than what no target holds "
                f"(embeddings, head, norms): that alone is {least:.3f}; keep more, or count "
                "targets only (scope 'targets')"
            )
        return allowed


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank for each targeted linear; None leaves it dense.

    Examples
    --------
    >>> plan = RankPlan({"a": 2, "b": None})
    >>> plan.params([LinearShape("a", 8, 8), LinearShape("b", 4, 4)])
    48
    """

    ranks: Mapping[str, int | None]

    def params(self, shapes: Iterable[LinearShape]) -> int:
        """Parameters that the plan keeps of these linears."""
        return sum(shape.params(self.ranks[shape.name]) for shape in shapes)

    def check(
        self,
        shapes: Sequence[LinearShape],
        budget: Budget,
        other_params: int,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        """Hold the plan to its budget.

        Parameters
        ----------
        shapes : sequence of LinearShape
        budget : Budget
        other_params : int
            See `Budget.allowance`.
        fixed : mapping of str to int, optional
            Ranks decided elsewhere, even above break-even. At `param_ratio` 1 the sum may be over
            the budget by what they cost over dense, and by no more.

        Raises
        ------
        BudgetError
            If a rank is outside its bounds, or the sum is over the budget.
        """
        fixed = fixed or {}
        require_fixed(shapes, fixed)
        for shape in shapes:
            rank = self.ranks[shape.name]
            if shape.name in fixed:
                if rank != fixed[shape.name]:
                    raise BudgetError(f"{shape.name}: rank {rank} is fixed at {fixed[shape.name]}")
                continue
            if rank is not None and not budget.smallest_rank <= rank <= shape.break_even_rank:
                raise BudgetError(f"{shape.name}: rank {rank} is out of bounds")
            if rank is not None and rank % budget.multiple_of:
                raise BudgetError(f"{shape.name}: rank {rank} is no multiple")
        allowed = budget.target_params(shapes, other_params)
        if budget.param_ratio == 1:
            held = [shape for shape in shapes if shape.name in fixed]
            allowed += max(self.params(held) - sum(shape.dense_params for shape in held), 0)
        if self.params(shapes) > allowed:
            raise BudgetError(f"the plan keeps {self.params(shapes)} parameters of {allowed}")


def require_fixed(shapes: Sequence[LinearShape], fixed: Mapping[str, int]) -> None:
    """Refuse fixed ranks that no linear can have.

    Raises
    ------
    BudgetError
        If a name is not among the shapes, or a rank not within 1 and ``min(out, in)``.
    """
    known = {shape.name: shape for shape in shapes}
    for name, rank in fixed.items():
        if name not in known:
            raise BudgetError(f"{name}: rank {rank} is fixed, but no targeted linear has this name")
        largest = known[name].full_rank
        if not 1 <= rank <= largest:
            raise BudgetError(f"{name}: fixed rank {rank} is not within 1 and {largest}")
