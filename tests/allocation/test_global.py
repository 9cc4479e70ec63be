"""Global allocation against brute force over every plan, and by property."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import Budget, LinearShape, allocate_global
from slimrank.errors import BudgetError, NumericalError
from slimrank.linalg import tail_energy

relaxed = settings(deadline=None, max_examples=60)
ROUNDING = 1e-12  # relative to the losses at rank 0: of sums of a few float64 numbers

LAYOUTS = st.sampled_from(["plain", "pivoted", "auto"])
RATIOS = st.integers(1, 99).map(lambda hundredths: hundredths / 100)
VALUES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 10, allow_subnormal=False))


@st.composite
def models(draw, count=4, least=2, side=5, any_curve=False):
    """Shapes of one layout, and falling losses: tails of a spectrum, or any."""
    layout = draw(LAYOUTS)
    shapes, losses = [], {}
    for i in range(draw(st.integers(1, count))):
        shape = LinearShape(
            f"l{i}", draw(st.integers(least, side)), draw(st.integers(least, side)), layout
        )
        size = shape.full_rank + any_curve
        values = sorted(draw(st.lists(VALUES, min_size=size, max_size=size)), reverse=True)
        spectrum = torch.tensor(values, dtype=torch.float64)
        losses[shape.name] = spectrum if any_curve else tail_energy(spectrum)
        shapes.append(shape)
    return shapes, losses


def loss_of(losses, ranks):
    return sum(0.0 if r is None else float(losses[name][r]) for name, r in ranks.items())


def all_plans(shapes, losses, budget, may_stay_dense=True):
    """(cost, loss) of every plan that is allowed."""
    curves = []
    for s in shapes:
        allowed = range(budget.smallest_rank, s.break_even_rank + 1, budget.multiple_of)
        points = [(s.params(r), float(losses[s.name][r])) for r in allowed]
        if may_stay_dense or not points:
            points.append((s.dense_params, 0.0))
        curves.append(points)
    for chosen in itertools.product(*curves):
        yield sum(cost for cost, _ in chosen), sum(loss for _, loss in chosen)


def found_or_none(shapes, losses, budget, **options):
    try:
        return allocate_global(shapes, losses, budget, **options)
    except BudgetError:
        return None


# by hand

SQUARES = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]  # 16 a rank, break-even 3, dense 64
FALLING = {
    "a": torch.tensor([40.0, 10, 6, 4, 2, 1, 0, 0, 0], dtype=torch.float64),
    "b": torch.tensor([40.0, 9, 8, 7.5, 7, 6, 5, 4, 0], dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("params", "expected", "loss"),
    [
        # from 1 and 1, at 32. a: 4 for 16, then 6 for 32 (3 a step, beats 2 for 16). b: 9 for 48
        (32, [1, 1], 19),
        (48, [2, 1], 15),
        # worth 3/16: b whole, or a whole; b's edge starts lower, at rank 1
        (96, [2, None], 6),
        (80, [None, 1], 9),
        (64, [3, 1], 13),
        (127, [3, None], 4),
        (128, [None, None], 0),
    ],
)
def test_by_hand(params, expected, loss):
    found = allocate_global(SQUARES, FALLING, Budget(params / 128))
    assert found.plan.ranks == dict(zip("ab", expected, strict=True))
    assert found.predicted_loss == loss


def test_the_marginal_is_what_the_next_edge_is_worth():
    assert allocate_global(SQUARES, FALLING, Budget(32 / 128)).marginal == 4 / 16
    assert allocate_global(SQUARES, FALLING, Budget(48 / 128)).marginal == 3 / 16
    assert allocate_global(SQUARES, FALLING, Budget(1.0)).marginal == 0


def test_a_linear_may_be_kept_from_staying_dense():
    found = allocate_global(SQUARES, FALLING, Budget(0.99), may_stay_dense=False)
    assert found.plan.ranks == {"a": 3, "b": 3}
    assert found.predicted_loss == 11.5
    found = allocate_global(SQUARES, FALLING, Budget(1.0), may_stay_dense=False)
    assert found.plan.ranks == {"a": None, "b": None}


def test_fixed_ranks_are_paid_first_and_not_looked_at():
    found = allocate_global(SQUARES, {"a": FALLING["a"]}, Budget(112 / 128), fixed={"b": 5})
    assert found.plan.ranks == {"a": 2, "b": 5}
    assert found.predicted_loss == 6
    found = allocate_global(SQUARES, {}, Budget(1.0), fixed={"b": 8})
    assert found.plan.ranks == {"a": None, "b": 8}


def test_what_no_rank_makes_smaller_stays_dense_and_is_paid():
    shapes = [*SQUARES, LinearShape("row", 1, 9)]
    found = allocate_global(shapes, FALLING, Budget(60 / 137))
    assert found.plan.ranks == {"a": 2, "b": 1, "row": None}


def test_a_multiple_and_a_least_rank_bound_the_choice():
    shapes = [replace(s, layout="auto", out_features=16, in_features=16) for s in SQUARES]
    losses = {name: torch.arange(16.0, -1, -1, dtype=torch.float64) for name in "ab"}
    plan = allocate_global(shapes, losses, Budget(0.8, multiple_of=3, min_rank=4)).plan
    # 409 of 512 parameters: 168 at rank 6, 225 at 9, 256 dense; both at 6 leave 73
    assert plan.ranks == {"a": 9, "b": 6}


def test_no_linears_make_an_empty_plan():
    assert allocate_global([], {}, Budget(0.5)).plan.ranks == {}


def test_too_small_a_budget_names_the_share_that_works():
    with pytest.raises(BudgetError, match=r"keep 0\.2 does not hold rank 1 .* works is 0\.2500"):
        allocate_global(SQUARES, FALLING, Budget(0.2))
    assert allocate_global(SQUARES, FALLING, Budget(0.25)).plan.ranks == {"a": 1, "b": 1}
    with pytest.raises(BudgetError, match=r"beside what cannot shrink or is fixed; .* is 0\.7500"):
        allocate_global(SQUARES, FALLING, Budget(0.5), fixed={"b": 5})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0] * 8, ValueError, "a: losses at 9 ranks are needed, from 0 on, not at 8"),
        ([1.0] * 8 + [math.nan], NumericalError, "a: its losses are not finite"),
        ([1.0] * 8 + [2.0], ValueError, "a: losses over dense must not rise"),
        ([1.0] * 8 + [-0.1], ValueError, "a: losses over dense must not rise"),
    ],
)
def test_what_is_no_curve_is_refused(values, error, message):
    losses = {**FALLING, "a": torch.tensor(values, dtype=torch.float64)}
    with pytest.raises(error, match=message):
        allocate_global(SQUARES, losses, Budget(0.5))


# by property


@given(model=models(), ratio=RATIOS, step=st.sampled_from([1, 1, 2]), dense=st.booleans())
@relaxed
def test_no_plan_of_its_cost_loses_less_on_a_vertex_and_one_edge_bounds_the_rest(
    model, ratio, step, dense
):
    shapes, losses = model
    budget = Budget(ratio, multiple_of=step)
    allowed = budget.target_params(shapes, 0)
    plans = list(all_plans(shapes, losses, budget, dense))
    fitting = [loss for cost, loss in plans if cost <= allowed]
    found = found_or_none(shapes, losses, budget, may_stay_dense=dense)
    if found is None:
        assert not fitting
        return
    slack = ROUNDING * (1 + sum(float(curve[0]) for curve in losses.values()))
    cost = found.plan.params(shapes)
    assert cost <= allowed
    assert found.predicted_loss == pytest.approx(loss_of(losses, found.plan.ranks), abs=slack)
    best = min(fitting)
    # weak duality: by the multiplier, no plan within the budget loses less than this
    least = min(loss + found.marginal * other for other, loss in plans)
    assert least - found.marginal * allowed <= best + slack
    # the edge that did not fit is of some linear, and gains its worth times its cost
    dearest = max((s.dense_params for s in shapes), default=0)
    assert found.predicted_loss <= best + found.marginal * dearest + slack
    # on a vertex of all hulls at the multiplier, the plan is the best of all that cost no more
    if found.predicted_loss + found.marginal * cost <= least + slack:
        cheaper = min(loss for other, loss in plans if other <= cost)
        assert found.predicted_loss <= cheaper + slack


@given(model=models(any_curve=True), ratio=RATIOS, more=RATIOS, dense=st.booleans())
@relaxed
def test_a_larger_budget_never_loses_more(model, ratio, more, dense):
    shapes, losses = model
    low, high = sorted((ratio, more))
    less = found_or_none(shapes, losses, Budget(low), may_stay_dense=dense)
    if less is not None:
        most = allocate_global(shapes, losses, Budget(high), may_stay_dense=dense)
        assert most.predicted_loss <= less.predicted_loss + ROUNDING * (
            1 + sum(float(curve[0]) for curve in losses.values())
        )


@given(model=models(side=9, any_curve=True), ratio=RATIOS)
@relaxed
def test_nothing_that_fits_and_gains_is_left(model, ratio):
    shapes, losses = model
    budget = Budget(ratio)
    found = found_or_none(shapes, losses, budget)
    if found is None:
        return
    left = budget.target_params(shapes, 0) - found.plan.params(shapes)
    for s in shapes:
        rank = found.plan.ranks[s.name]
        if rank is not None:
            assert s.params(rank + 1) - s.params(rank) > left or rank == s.break_even_rank
            assert s.dense_params - s.params(rank) > left


@given(model=models(), ratio=RATIOS, data=st.data())
@relaxed
def test_relabelling_linears_relabels_the_plan(model, ratio, data):
    shapes, losses = model
    new = dict(zip(losses, data.draw(st.permutations("wxyz")), strict=False))
    found = found_or_none(shapes, losses, Budget(ratio))
    renamed = found_or_none(
        [replace(s, name=new[s.name]) for s in shapes],
        {new[name]: curve for name, curve in losses.items()},
        Budget(ratio),
    )
    assert (found is None) == (renamed is None)
    if found is not None:
        assert renamed.plan.ranks == {new[n]: rank for n, rank in found.plan.ranks.items()}


@given(ratio=RATIOS, order=st.permutations(range(4)), layout=LAYOUTS)
@relaxed
def test_the_order_of_linears_is_immaterial_without_ties(ratio, order, layout):
    generator = torch.Generator().manual_seed(0)
    sides = [(9, 9), (9, 5), (12, 7), (9, 9)]
    shapes = [LinearShape(name, *pair, layout) for name, pair in zip("abcd", sides, strict=True)]
    losses = {
        s.name: tail_energy(
            torch.rand(s.full_rank, generator=generator, dtype=torch.float64)
            .sort(descending=True)
            .values
        )
        for s in shapes
    }
    found = found_or_none(shapes, losses, Budget(ratio))
    again = found_or_none([shapes[i] for i in order], losses, Budget(ratio))
    assert (found is None) == (again is None)
    if found is not None:
        assert again.plan.ranks == found.plan.ranks
