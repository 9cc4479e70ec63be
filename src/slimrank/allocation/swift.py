"""Swift-SVD's dynamic ranks: blocks that matter more, or lose more, get more."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

from slimrank.allocation.budget import Budget, Layout, RankPlan
from slimrank.allocation.profile import LinearProfile
from slimrank.allocation.uniform import uniform
from slimrank.errors import BudgetError


def swift(
    profiles: Sequence[LinearProfile],
    budget: Budget,
    other_params: int = 0,
    *,
    importance_weight: float,
    retained_share: float = 0.5,
    fixed: Mapping[str, int] | None = None,
) -> RankPlan:
    r"""Move ranks between blocks, by importance and by what the uniform rank would lose.

    Linears of one kind and shape form a pool. Each keeps a share δ of its uniform rank k̄; the rest
    of the pool is dealt out in proportion to the score (equation 12)

    .. math:: s_i = \beta_i^\alpha \, \ln(e + \varepsilon^*_{\bar k, i})^{1 - \alpha}

    with β the block's importance, min-max normalised to [1, 2], and ε* the `residual`. A pool's
    ranks add up to exactly what `uniform` gives it, so the budget is kept for every shape; in the
    pivoted layout, where one more rank costs less the more there are, unequal ranks of the same sum
    cost less than equal ones, and the difference is not spent. What `uniform` leaves dense stays
    dense.

    Parameters
    ----------
    profiles : sequence of LinearProfile
        The targeted linears.
    budget : Budget
    other_params : int
        Parameters of the model outside the targets, for scope 'model'.
    importance_weight : float
        α in [0, 1]: at 0 importance does not count, at 1 loss does not.
    retained_share : float
        δ in [0, 1]: at 1 the plan is the uniform one, at 0 only the smallest rank is safe.
    fixed : mapping of str to int, optional
        Ranks decided elsewhere; see `uniform`. They take no part in any pool.

    Returns
    -------
    RankPlan

    Raises
    ------
    BudgetError
        If α or δ is out of its range, or `uniform` finds no ranks.

    Notes
    -----
    Deviations from the paper. k̄ is the whole rank that `uniform` gives, not ρ·mn/(m+n), and ε* is
    taken there. A pool is of one kind *and* shape: the paper is written for one size of matrix.
    Rounding, left open in the paper, is by largest remainder in steps of `multiple_of`. No rank
    passes break-even, where the paper names no bound. Importances that are all equal give β = 1,
    where the paper divides by zero. δ = 0, which its text excludes and its table 6 uses, may be
    asked for. α is an argument; the search for it is not made here.

    Deviations from the authors' code. ε* is the error at k̄ and not the norm of all outputs; the
    logarithm is of e + ε and not of 1 + ε; δ does what it says, where their floor is a quarter of
    ρ·out whatever δ is: over budget from out > 3·in on, for any scores.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), algorithm 2 and equation 12.

    Examples
    --------
    Uniform ranks are 10, floors 5, and the pool of 15 is shared as 1 : 4/3 : 2.

    >>> import torch
    >>> from slimrank.allocation import LinearShape
    >>> spectrum = torch.ones(40, dtype=torch.float64)
    >>> profiles = [
    ...     LinearProfile(LinearShape(f"{i}.q", 40, 40), "q", i, spectrum, 100, importance)
    ...     for i, importance in enumerate([0.0, 1.0, 3.0])
    ... ]
    >>> dict(swift(profiles, Budget(0.5), importance_weight=1.0).ranks)
    {'0.q': 8, '1.q': 10, '2.q': 12}
    """
    _require_share("importance_weight", importance_weight)
    _require_share("retained_share", retained_share)
    shapes = [profile.shape for profile in profiles]
    plan = uniform(shapes, budget, other_params, fixed)
    ranks = dict(plan.ranks)
    importances = _normalized_importances(profiles)
    step = budget.multiple_of
    for (*_, uniform_rank), pool in _pools(profiles, plan, fixed or {}).items():
        kept = int(Fraction(str(retained_share)) * uniform_rank) // step * step
        floor = max(kept, budget.smallest_rank)
        room = (shapes[pool[0]].break_even_rank - floor) // step
        scores = [
            importances[i] ** importance_weight
            * math.log(math.e + profiles[i].residual(uniform_rank)) ** (1 - importance_weight)
            for i in pool
        ]
        flexible = len(pool) * (uniform_rank - floor)
        extra = _share_out(flexible // step, scores, room)
        for i, steps in zip(pool, extra, strict=True):
            ranks[shapes[i].name] = floor + steps * step
    result = RankPlan(ranks)
    result.check(shapes, budget, other_params, fixed)
    return result


def _require_share(name: str, value: float) -> None:
    """Refuse what is not within 0 and 1."""
    if not 0 <= value <= 1:
        raise BudgetError(f"{name} lies in [0, 1], not {value:g}")


def _normalized_importances(profiles: Sequence[LinearProfile]) -> list[float]:
    """Importances min-max normalised to [1, 2], over the blocks of all kinds together.

    A block's importance stands in each of its profiles, which moves neither end.
    """
    values = [profile.importance for profile in profiles]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return [1 + (value - low) / (high - low) if high > low else 1.0 for value in values]


def _pools(
    profiles: Sequence[LinearProfile], plan: RankPlan, fixed: Mapping[str, int]
) -> dict[tuple[str, int, int, Layout, int], list[int]]:
    """Positions of the profiles that share ranks, by kind, sides, layout and uniform rank.

    Equal sides and layouts have equal uniform ranks: the last part of the key splits no pool.
    """
    pools: dict[tuple[str, int, int, Layout, int], list[int]] = defaultdict(list)
    for i, profile in enumerate(profiles):
        shape = profile.shape
        rank = plan.ranks[shape.name]
        if rank is not None and shape.name not in fixed:
            sides = (shape.out_features, shape.in_features)
            pools[profile.kind, *sides, shape.layout, rank].append(i)
    return pools


def _share_out(pool: int, scores: Sequence[float], room: int) -> list[int]:
    """Deal whole steps out in proportion to scores, at most `room` to each.

    Whoever's quota is over the room gets the room, and what that refuses goes to the others, again
    in proportion to their scores, until no quota is over. Only then are quotas rounded down and the
    last steps given to the largest remainders; equal remainders go by score, and where the scores
    are equal too, by position, the one case in which order matters. Fractions are exact, so neither
    the order of a sum nor its rounding can decide.

    Parameters
    ----------
    pool : int
        Steps to deal; no more than `room` for each, so all of them are dealt.
    scores : sequence of float
        Positive.
    room : int
    """
    weights = [Fraction(score) for score in scores]
    dealt = [room] * len(weights)
    taking = list(range(len(weights)))
    while True:
        left = pool - room * (len(weights) - len(taking))
        total = sum((weights[i] for i in taking), Fraction(0))
        quotas = {i: left * weights[i] / total for i in taking}
        within = [i for i in taking if quotas[i] <= room]
        if len(within) == len(taking):
            break
        taking = within
    for i in taking:
        dealt[i] = int(quotas[i])
    order = sorted(taking, key=lambda i: (int(quotas[i]) - quotas[i], -weights[i]))
    for i in order[: pool - sum(dealt)]:
        dealt[i] += 1
    return dealt
