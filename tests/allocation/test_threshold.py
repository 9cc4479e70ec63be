"""Zero-sum selection: by hand, and against a plain walk through its rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import Budget, LinearShape, threshold
from slimrank.errors import BudgetError, NumericalError

relaxed = settings(deadline=None, max_examples=60)

SQUARES = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]  # 16 a rank, break-even 3, dense 64
ONES = dict.fromkeys("ab", torch.ones(8, dtype=torch.float64))


def changing(**changes):
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in changes.items()}


def test_gains_and_losses_take_turns():
    """Last components first: a's harm by 1, b's help by 3, then harm by 0.5.

    Sums: a 1; b -3 is -2; then harm is wanted, and b's 0.5 is the smaller; so on until b has none
    left above its smallest rank: 5 more of 0.5 are 0.5 in all, at which help is wanted, and there
    is none.
    """
    changes = changing(a=[1.0] * 8, b=[9.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, -3.0])
    # b from 8 to 3 frees 16; a's have only one gone
    plan = threshold(SQUARES, changes, Budget(112 / 128))
    assert plan.ranks == {"a": None, "b": 3}
    plan = threshold(SQUARES, changes, Budget(80 / 128))
    assert plan.ranks == {"a": None, "b": 1}
    plan = threshold(SQUARES, changes, Budget(32 / 128))
    assert plan.ranks == {"a": 1, "b": 1}


def test_a_component_that_helps_waits_until_harm_was_done():
    """At 0 harm goes first, even if it is the larger."""
    shapes = [LinearShape("a", 3, 9), LinearShape("b", 3, 9)]  # 12 a rank, break-even 2, dense 27
    # of 54 parameters 51 may stay, and 48
    changes = changing(a=[5.0, 5, 5], b=[-1.0, -1, -1])
    plan = threshold(shapes, changes, Budget(0.95))
    assert plan.ranks == {"a": 2, "b": None}
    plan = threshold(shapes, changes, Budget(0.89))
    assert plan.ranks == {"a": 2, "b": 2}


def test_of_singular_values_it_is_one_threshold():
    spectra = {"a": torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2]), "b": torch.linspace(5.5, 5.2, 8)}
    # below 5.2: a's 5, 4, 3, 2 go; then b's from 5.2 to 5.5, and a's 6, 7, 8
    plan = threshold(SQUARES, spectra, Budget(112 / 128))
    assert plan.ranks == {"a": None, "b": 3}
    plan = threshold(SQUARES, spectra, Budget(64 / 128))
    assert plan.ranks == {"a": 3, "b": 1}


def test_fixed_ranks_and_keep_all():
    assert threshold(SQUARES, {}, Budget(1.0), fixed={"b": 8}).ranks == {"a": None, "b": 8}
    plan = threshold(SQUARES, {"a": torch.ones(8)}, Budget(112 / 128), fixed={"b": 5})
    assert plan.ranks == {"a": 2, "b": 5}


def test_the_pivoted_layout_frees_what_it_says():
    """Ranks of 8 x 8 cost 17, 32, 45, 56: break-even is 4, and 56 + 64 are 120."""
    shapes = [LinearShape("a", 8, 8, "pivoted"), LinearShape("b", 8, 8, "pivoted")]
    spectra = {"a": torch.full((8,), 9.0), "b": torch.ones(8)}
    assert threshold(shapes, spectra, Budget(120 / 128)).ranks == {"a": None, "b": 4}
    assert threshold(shapes, spectra, Budget(119 / 128)).ranks == {"a": None, "b": 3}


def test_too_small_a_budget_is_refused():
    with pytest.raises(BudgetError, match=r"the smallest share that works is 0\.2500"):
        threshold(SQUARES, ONES, Budget(0.2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ([1.0] * 9, ValueError, "a: 8 changes are needed, not 9"),
        ([math.nan] * 8, NumericalError, "a: its changes are not finite; calibrate again"),
    ],
)
def test_what_cannot_be_ordered(changes, error, message):
    with pytest.raises(error, match=message):
        threshold(SQUARES, {**ONES, "a": torch.tensor(changes)}, Budget(0.5))


def walk(shapes, changes, budget):
    """The rule with lists in place of heaps; no two changes alike."""
    ranks = {s.name: s.full_rank for s in shapes}
    by_name = {s.name: s for s in shapes}
    total = 0.0

    def cost():
        return sum(
            s.params(ranks[s.name] if ranks[s.name] <= s.break_even_rank else None) for s in shapes
        )

    while cost() > budget.target_params(shapes, 0):
        offered = {}
        for name, rank in ranks.items():
            below = (rank - 1) // budget.multiple_of * budget.multiple_of
            if budget.smallest_rank <= below and by_name[name].break_even_rank:
                offered[name] = (below, float(sum(changes[name][below:rank].tolist())))
        wanted = [n for n, (_, x) in offered.items() if (x >= 0) == (total <= 0)] or list(offered)
        name = min(wanted, key=lambda n: abs(offered[n][1]))
        ranks[name] = offered[name][0]
        total += offered[name][1]
    return {s.name: ranks[s.name] if ranks[s.name] <= s.break_even_rank else None for s in shapes}


@given(
    seed=st.integers(0, 2**31),
    sides=st.lists(st.tuples(st.integers(4, 9), st.integers(4, 9)), min_size=1, max_size=4),
    ratio=st.integers(1, 99),
    step=st.sampled_from([1, 2]),
    layout=st.sampled_from(["plain", "auto"]),
)
@relaxed
def test_against_a_plain_walk(seed, sides, ratio, step, layout):
    generator = torch.Generator().manual_seed(seed)
    shapes = [LinearShape(f"l{i}", *pair, layout) for i, pair in enumerate(sides)]
    if any(s.break_even_rank < step for s in shapes):
        return
    changes = {
        s.name: torch.randn(s.full_rank, generator=generator, dtype=torch.float64) for s in shapes
    }
    budget = Budget(ratio / 100, multiple_of=step)
    try:
        plan = threshold(shapes, changes, budget)
    except BudgetError:
        least = sum(s.params(budget.smallest_rank) for s in shapes)
        assert least > budget.target_params(shapes, 0)
        return
    assert plan.ranks == walk(shapes, changes, budget)


@given(seed=st.integers(0, 2**31), first=st.integers(25, 99), second=st.integers(25, 99))
@relaxed
def test_a_larger_budget_never_gives_a_smaller_rank(seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    changes = {name: torch.randn(8, generator=generator) for name in "ab"}
    low, high = sorted((first, second))
    less = threshold(SQUARES, changes, Budget(low / 100))
    more = threshold(SQUARES, changes, Budget(high / 100))
    for name, rank in less.ranks.items():
        assert (more.ranks[name] or math.inf) >= (rank or math.inf)
