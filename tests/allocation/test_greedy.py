"""Ranks by marginal gain: by hand, against brute force, and by property."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimrank.allocation import LinearShape, greedy
from slimrank.errors import BudgetError, NumericalError
from slimrank.linalg import tail_energy

relaxed = settings(deadline=None, max_examples=60)
ROUNDING = 1e-12  # relative to all energy: of sums of a few dozen float64 numbers

STEPS = st.sampled_from([1, 2, 3])
LAYOUTS = ("plain", "pivoted", "auto")
VALUES = st.floats(0, 100, allow_subnormal=False)


@st.composite
def blocks(draw, count=4, side=12, least=3, equal=False, layouts=("plain",)):
    """Shapes, spectra and weights; names tell nothing of the order."""
    number = draw(st.integers(1, count))
    sides = st.tuples(st.integers(least, side), st.integers(least, side))
    pairs = [draw(sides)] * number if equal else [draw(sides) for _ in range(number)]
    names = draw(st.permutations([f"l{i}" for i in range(number)]))
    layout = draw(st.sampled_from(layouts))
    shapes = [LinearShape(name, *pair, layout) for name, pair in zip(names, pairs, strict=True)]
    spectra, weights = {}, {}
    for shape in shapes:
        length = min(shape.out_features, shape.in_features)
        values = draw(st.lists(VALUES, min_size=length, max_size=length))
        spectra[shape.name] = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        weights[shape.name] = draw(st.floats(0, 10))
    return shapes, spectra, weights


def smallest_rank(step, least):
    return math.ceil(least / step) * step


def cost_of(shapes, ranks):
    return sum(shape.params(ranks[shape.name]) for shape in shapes)


def loss_of(spectra, weights, ranks):
    return sum(w * float(tail_energy(spectra[name])[ranks[name]]) for name, w in weights.items())


def energy_of(spectra, weights):
    return loss_of(spectra, weights, dict.fromkeys(weights, 0))


def least_loss(shapes, spectra, weights, params, step=1, least=1):
    """Of all ranks that are allowed and fit; None if none do."""
    start = smallest_rank(step, least)
    choices = [range(start, shape.break_even_rank + 1, step) for shape in shapes]
    names = [shape.name for shape in shapes]
    plans = (dict(zip(names, ranks, strict=True)) for ranks in itertools.product(*choices))
    losses = (loss_of(spectra, weights, r) for r in plans if cost_of(shapes, r) <= params)
    return min(losses, default=None)


def all_shrink(shapes, step=1, least=1):
    return all(smallest_rank(step, least) <= shape.break_even_rank for shape in shapes)


# by hand

SQUARES = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]  # 16 a rank, break-even 3
FALLING = {
    "a": torch.tensor([4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0]),
    "b": torch.tensor([3.0, 1.0, 0, 0, 0, 0, 0, 0]),
}
EVEN = {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("weights", "params", "expected"),
    [
        # from 1 and 1, which cost 32; a's next two gain 9 and 4, b's 1 and 0
        (EVEN, 32, [1, 1]),
        (EVEN, 47, [1, 1]),
        (EVEN, 48, [2, 1]),
        (EVEN, 64, [3, 1]),
        (EVEN, 80, [3, 2]),
        (EVEN, 96, [3, 3]),
        # break-even, and nobody takes the rest
        (EVEN, 10_000, [3, 3]),
        # b's 1 counts 5, between 9 and 4
        ({"a": 1.0, "b": 5.0}, 48, [2, 1]),
        ({"a": 1.0, "b": 5.0}, 64, [2, 2]),
        # b's 1 counts 10
        ({"a": 1.0, "b": 10.0}, 48, [1, 2]),
        # a counts nothing: its steps wait for b's 1, and b's next gains nothing either
        ({"a": 0.0, "b": 1.0}, 48, [1, 2]),
        ({"a": 0.0, "b": 1.0}, 64, [2, 2]),
        ({"a": 1.0, "b": 0.0}, 64, [3, 1]),
        ({"a": 1.0, "b": 0.0}, 80, [3, 2]),
    ],
)
def test_by_hand(weights, params, expected):
    ranks = greedy(SQUARES, FALLING, weights, params)
    assert list(ranks.items()) == list(zip("ab", expected, strict=True))


def test_a_parameter_counts_and_not_a_rank():
    """The second rank of wide gains 4 for 20, that of narrow 3 for 10."""
    shapes = [LinearShape("wide", 4, 16), LinearShape("narrow", 5, 5)]
    spectra = {"wide": torch.tensor([3.0, 2, 0, 0]), "narrow": torch.tensor([3, 3**0.5, 0, 0, 0])}
    weights = {"wide": 1.0, "narrow": 1.0}
    assert greedy(shapes, spectra, weights, 30 + 20) == {"wide": 1, "narrow": 2}
    assert greedy(shapes, spectra, weights, 30 + 30) == {"wide": 2, "narrow": 2}


def test_a_step_that_does_not_fit_is_passed_over():
    """Wide gains 100 for 20, narrow 1 for 10, and 19 are left."""
    shapes = [LinearShape("wide", 4, 16), LinearShape("narrow", 5, 5)]
    spectra = {"wide": torch.tensor([10.0, 10, 0, 0]), "narrow": torch.tensor([1.0, 1, 0, 0, 0])}
    weights = {"wide": 1.0, "narrow": 1.0}
    assert greedy(shapes, spectra, weights, 49) == {"wide": 1, "narrow": 2}
    assert greedy(shapes, spectra, weights, 50) == {"wide": 2, "narrow": 1}


def test_a_step_is_worth_the_mean_of_its_ranks():
    """Ranks 3 and 4 of a gain 4 + 0, of b 2 + 2.1; by the first rank alone a would be ahead."""
    shapes = [LinearShape("a", 12, 12), LinearShape("b", 12, 12)]
    spectra = {
        "a": torch.tensor([4.0, 4, 2, 0] + [0] * 8),
        "b": torch.tensor([4.0, 4, 1.45, 1.414] + [0] * 8),
    }
    assert greedy(shapes, spectra, EVEN, 144, multiple_of=2) == {"a": 2, "b": 4}
    assert greedy(shapes, spectra, EVEN, 120) == {"a": 3, "b": 2}


def test_steps_of_equal_worth_go_around():
    """Nothing tells the linears apart: the lower rank is first, then the order of shapes."""
    shapes = [LinearShape(name, 20, 20) for name in "bca"]  # 40 a rank, break-even 9
    spectra = {name: torch.ones(20) for name in "abc"}
    for weight in (0.0, 1.0):
        weights = dict.fromkeys("abc", weight)
        assert greedy(shapes, spectra, weights, 120 + 200) == {"b": 3, "c": 3, "a": 2}


def test_fixed_ranks_are_paid_first():
    """b holds 5, over break-even: 80 of 144; 16 a rank leave a 4, and break-even 3."""
    assert greedy(SQUARES, FALLING, EVEN, 144, fixed={"b": 5}) == {"a": 3, "b": 5}
    assert greedy(SQUARES, FALLING, EVEN, 127, fixed={"b": 5}) == {"a": 2, "b": 5}
    assert greedy(SQUARES, {}, {}, 112, fixed={"a": 2, "b": 5}) == {"a": 2, "b": 5}


def test_no_linears():
    assert greedy([], {}, {}, 0) == {}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (31, {}, r"^a and 1 more: 31 parameters do not hold rank 1 for each, which takes 32; keep"),
        (63, {"min_rank": 2}, "do not hold rank 2 for each, which takes 64"),
        (63, {"multiple_of": 2}, "do not hold rank 2 for each, which takes 64"),
        (95, {"fixed": {"b": 5}}, "which takes 16 beside 80 of fixed ranks"),
        (999, {"min_rank": 4}, "^a: rank 4 does not make a linear of 8 x 8 smaller; leave it dens"),
        (999, {"fixed": {"c": 1}}, "no targeted linear has this name"),
        (999, {"fixed": {"a": 9}}, "fixed rank 9 is not within 1 and 8"),
        (999, {"multiple_of": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_met(params, options, message):
    with pytest.raises(BudgetError, match=message):
        greedy(SQUARES, FALLING, EVEN, params, **options)


@pytest.mark.parametrize(
    ("spectrum", "weight", "error", "message"),
    [
        ([1.0, math.nan, 0, 0, 0, 0, 0, 0], 1.0, NumericalError, "a: its spectrum is not finite"),
        ([1.0] * 8, math.nan, NumericalError, "a: its weight in the block is not finite"),
        ([1.0] * 8, math.inf, NumericalError, "a: its weight in the block is not finite"),
        ([1.0] * 8, -0.5, ValueError, "a: its weight in the block is negative: -0.5"),
        ([1.0] * 7 + [2.0], 1.0, ValueError, "a: singular values must descend"),
        ([1.0] * 7, 1.0, ValueError, r"a: a spectrum of 8 values is needed, not \[7\]"),
    ],
)
def test_what_cannot_be_ordered(spectrum, weight, error, message):
    spectra = {**FALLING, "a": torch.tensor(spectrum)}
    with pytest.raises(error, match=message):
        greedy(SQUARES, spectra, {"a": weight, "b": 1.0}, 64)
    fixed = greedy(SQUARES, spectra, {"a": weight, "b": 1.0}, 64, fixed={"a": 2})
    assert fixed == {"a": 2, "b": 2}


def test_pivoted_steps_that_grow_in_worth_go_together():
    """Ranks of 8 x 8 cost 17, 32, 45, 56: steps of 15, 13 and 11.

    In a they gain 13 each, so all three are one edge, of worth 1; b's first gains 10.5 of 15.
    """
    shapes = [LinearShape("a", 8, 8, "pivoted"), LinearShape("b", 8, 8, "pivoted")]
    squares = {"a": [90, 13, 13, 13, 0, 0, 0, 0], "b": [90, 10.5, 0, 0, 0, 0, 0, 0]}
    spectra = {name: torch.tensor(x, dtype=torch.float64).sqrt() for name, x in squares.items()}
    # 34 are the smallest ranks, 39 the edge of a, 15 the step of b
    assert greedy(shapes, spectra, EVEN, 34 + 39 + 14) == {"a": 4, "b": 1}
    assert greedy(shapes, spectra, EVEN, 34 + 39 + 15) == {"a": 4, "b": 2}
    # an edge that does not fit is walked as far as there is room: 13 for 15, and 13 for 13
    assert greedy(shapes, spectra, EVEN, 34 + 38) == {"a": 3, "b": 1}
    assert greedy(shapes, spectra, EVEN, 34 + 27) == {"a": 2, "b": 1}


# by property


@given(block=blocks(equal=True), step=STEPS, least=st.integers(1, 3), params=st.integers(0, 500))
@relaxed
def test_optimal_where_steps_cost_the_same(block, step, least, params):
    shapes, spectra, weights = block
    assume(all_shrink(shapes, step, least))
    best = least_loss(shapes, spectra, weights, params, step, least)
    if best is None:
        with pytest.raises(BudgetError):
            greedy(shapes, spectra, weights, params, multiple_of=step, min_rank=least)
        return
    ranks = greedy(shapes, spectra, weights, params, multiple_of=step, min_rank=least)
    slack = ROUNDING * energy_of(spectra, weights)
    assert loss_of(spectra, weights, ranks) == pytest.approx(best, rel=0, abs=slack)


@given(block=blocks(), step=STEPS, params=st.integers(0, 400))
@relaxed
def test_one_step_from_the_optimum_whatever_steps_cost(block, step, params):
    """No worse than the best within a budget that lacks the dearest step, but one parameter."""
    shapes, spectra, weights = block
    assume(all_shrink(shapes, step))
    dearest = max(step * shape.params(1) for shape in shapes)
    bound = least_loss(shapes, spectra, weights, params - dearest + 1, step)
    assume(bound is not None)
    ranks = greedy(shapes, spectra, weights, params, multiple_of=step)
    slack = ROUNDING * energy_of(spectra, weights)
    assert loss_of(spectra, weights, ranks) <= bound + slack


@given(
    block=blocks(side=40, layouts=LAYOUTS),
    step=STEPS,
    least=st.integers(1, 3),
    params=st.integers(0, 3000),
)
@relaxed
def test_within_the_budget_and_the_bounds(block, step, least, params):
    shapes, spectra, weights = block
    assume(all_shrink(shapes, step, least))
    start = smallest_rank(step, least)
    if cost_of(shapes, {shape.name: start for shape in shapes}) > params:
        return
    ranks = greedy(shapes, spectra, weights, params, multiple_of=step, min_rank=least)
    assert list(ranks) == [shape.name for shape in shapes]
    left = params - cost_of(shapes, ranks)
    assert left >= 0
    for shape in shapes:
        rank = ranks[shape.name]
        assert rank % step == 0
        assert start <= rank <= shape.break_even_rank < min(shape.out_features, shape.in_features)
        # nothing that would still fit is left
        capped = rank + step > shape.break_even_rank
        assert capped or shape.params(rank + step) - shape.params(rank) > left


@given(
    block=blocks(layouts=LAYOUTS), step=STEPS, params=st.integers(0, 400), more=st.integers(0, 60)
)
@relaxed
def test_a_larger_budget_never_leaves_a_larger_loss(block, step, params, more):
    shapes, spectra, weights = block
    assume(all_shrink(shapes, step))
    smallest = cost_of(shapes, {shape.name: smallest_rank(step, 1) for shape in shapes})
    losses = [
        loss_of(spectra, weights, greedy(shapes, spectra, weights, amount, multiple_of=step))
        for amount in (smallest + params, smallest + params + more)
    ]
    assert losses[1] <= losses[0] + ROUNDING * energy_of(spectra, weights)


@given(block=blocks(layouts=LAYOUTS), params=st.integers(0, 400), data=st.data())
@relaxed
def test_relabelling_linears_relabels_the_ranks(block, params, data):
    shapes, spectra, weights = block
    new = dict(zip(spectra, data.draw(st.permutations(["x", "y", "z", "w"])), strict=False))
    smallest = cost_of(shapes, {shape.name: 1 for shape in shapes})
    ranks = greedy(shapes, spectra, weights, smallest + params)
    renamed = greedy(
        [replace(s, name=new[s.name]) for s in shapes],
        {new[name]: spectrum for name, spectrum in spectra.items()},
        {new[name]: weight for name, weight in weights.items()},
        smallest + params,
    )
    assert renamed == {new[name]: rank for name, rank in ranks.items()}


@given(params=st.integers(0, 400), order=st.permutations(range(4)))
@relaxed
def test_the_order_of_linears_is_immaterial_without_ties(params, order):
    generator = torch.Generator().manual_seed(0)
    shapes = [LinearShape(n, o, i) for n, o, i in [("a", 9, 9), ("b", 9, 5), ("c", 12, 7)]]
    shapes.append(LinearShape("d", 9, 9))
    spectra = {
        s.name: torch.rand(min(s.out_features, s.in_features), generator=generator)
        .sort(descending=True)
        .values
        for s in shapes
    }
    weights = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 0.7}
    smallest = cost_of(shapes, dict.fromkeys(weights, 1))
    ranks = greedy(shapes, spectra, weights, smallest + params)
    assert greedy([shapes[i] for i in order], spectra, weights, smallest + params) == ranks


@given(block=blocks(layouts=LAYOUTS), params=st.integers(0, 300), data=st.data())
@relaxed
def test_beside_a_fixed_rank_the_others_are_alone(block, params, data):
    """What is fixed, of whatever rank, changes nothing but the parameters that are left."""
    shapes, spectra, weights = block
    held = data.draw(st.sampled_from(shapes), label="held")
    rank = data.draw(st.integers(1, min(held.out_features, held.in_features)), label="rank")
    others = [shape for shape in shapes if shape is not held]
    total = cost_of(others, {shape.name: 1 for shape in others}) + params
    expected = greedy(others, spectra, weights, total)
    fixed = {held.name: rank}
    found = greedy(shapes, spectra, weights, total + held.params(rank), fixed=fixed)
    assert found == {**expected, held.name: rank}


@given(block=blocks(), params=st.integers(0, 400), factor=st.sampled_from([0.25, 2.0, 1024.0]))
@relaxed
def test_the_unit_of_the_loss_is_immaterial(block, params, factor):
    shapes, spectra, weights = block
    smallest = cost_of(shapes, {shape.name: 1 for shape in shapes})
    ranks = greedy(shapes, spectra, weights, smallest + params)
    scaled = {name: factor * weight for name, weight in weights.items()}
    louder = {name: factor * spectrum for name, spectrum in spectra.items()}
    assert greedy(shapes, spectra, scaled, smallest + params) == ranks
    assert greedy(shapes, louder, weights, smallest + params) == ranks
