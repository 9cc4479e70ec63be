from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import PIVOT_PARAMS, Budget, LinearShape, RankPlan
from slimrank.errors import BudgetError

relaxed = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, 80.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scope", ["targets", "model"])
def test_a_share_outside_its_range_is_refused(ratio, scope):
    with pytest.raises(BudgetError, match=r"lies in \(0, 1\]"):
        Budget(ratio, scope=scope)


@pytest.mark.parametrize("values", [{"multiple_of": 0}, {"min_rank": 0}, {"multiple_of": -8}])
def test_ranks_below_one_are_refused(values):
    with pytest.raises(BudgetError, match="at least 1"):
        Budget(0.5, **values)


def test_the_ends_of_the_range_are_allowed():
    assert Budget(1.0).param_ratio == 1.0
    assert Budget(1e-9).param_ratio == 1e-9


@given(multiple=st.integers(1, 64), least=st.integers(1, 200))
@relaxed
def test_smallest_rank_against_brute_force(multiple, least):
    expected = next(r for r in range(least, least + multiple) if r % multiple == 0)
    assert Budget(0.5, multiple_of=multiple, min_rank=least).smallest_rank == expected


@pytest.mark.parametrize(
    ("out", "inner", "dense", "per_rank", "break_even"),
    [
        (4096, 4096, 16777216, 8192, 2047),
        (1024, 4096, 4194304, 5120, 819),
        (14336, 4096, 58720256, 18432, 3185),
        (8, 8, 64, 16, 3),
        (1, 9, 9, 10, 0),
        (9, 1, 9, 10, 0),
        (1, 1, 1, 2, 0),
    ],
)
def test_linear_shapes_by_hand(out, inner, dense, per_rank, break_even):
    shape = LinearShape("a", out_features=out, in_features=inner)
    assert shape.dense_params == dense
    assert shape.params(1) == per_rank
    assert shape.params(2) == 2 * per_rank
    assert shape.break_even_rank == break_even
    assert shape.params(None) == dense
    assert shape.params(0) == 0
    assert shape.params(3) == 3 * per_rank


@pytest.mark.parametrize(
    ("layout", "costs", "break_even"),
    [
        # 8 x 8: 16 a rank; r (16 - r) and 2 for each pivot: 17, 32, 45, 56, 65; dense is 64
        ("plain", [0, 16, 32, 48, 64, 80], 3),
        ("pivoted", [0, 17, 32, 45, 56, 65], 4),
        ("auto", [0, 16, 32, 45, 56, 65], 4),
    ],
)
def test_layouts_by_hand(layout, costs, break_even):
    shape = LinearShape("a", 8, 8, layout)
    assert [shape.params(rank) for rank in range(6)] == costs
    assert shape.break_even_rank == break_even
    assert [shape.is_pivoted(r) for r in range(1, 5)] == [
        layout == "pivoted" or (layout == "auto" and r > 2) for r in range(1, 5)
    ]
    assert shape.largest_rank(-1) == 0
    assert shape.largest_rank(15) == 0
    assert shape.largest_rank(10**9) == 8


SHAPES_OF_ANY_LAYOUT = st.builds(
    LinearShape,
    st.just("a"),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(["plain", "pivoted", "auto"]),
)


@given(shape=SHAPES_OF_ANY_LAYOUT, params=st.integers(0, 4000))
@relaxed
def test_ranks_and_costs_against_brute_force(shape, params):
    costs = [shape.params(rank) for rank in range(shape.full_rank + 1)]
    assert costs[0] == 0
    assert costs == sorted(set(costs)), "costs rise"
    assert shape.largest_rank(params) == max(r for r, cost in enumerate(costs) if cost <= params)
    assert shape.break_even_rank == max(r for r, c in enumerate(costs) if c < shape.dense_params)
    assert [shape.largest_rank(cost) for cost in costs] == list(range(len(costs)))


@given(out=st.integers(1, 60), inner=st.integers(1, 60))
@relaxed
def test_the_pivoted_layout_costs_no_more_from_rank_2_on(out, inner):
    plain, pivoted, auto = (LinearShape("a", out, inner, x) for x in ("plain", "pivoted", "auto"))
    for rank in range(min(out, inner) + 1):
        assert auto.params(rank) == min(plain.params(rank), pivoted.params(rank))
        assert auto.is_pivoted(rank) == (pivoted.params(rank) < plain.params(rank))
        assert auto.is_pivoted(rank) == (rank >= 3)
    assert plain.break_even_rank <= auto.break_even_rank
    # what the factors hold: the latent's rows, the other outputs, and a pivot for each rank
    rank = min(out, inner)
    assert pivoted.params(rank) == rank * inner + (out - rank) * rank + PIVOT_PARAMS * rank


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        # the product of floats falls just short of the whole number in each of these
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.58, 100, 58),
        (1.1e-3, 10000, 11),
        (0.7, 10, 7),
        (1e-3, 1000, 1),
        (1e-3, 999, 0),
        (1e-5, 100000, 1),
        (0.7, 6979321856, 4885525299),
        (0.1, 3 * 10**17, 3 * 10**16),
        (1.0, 12345, 12345),
    ],
)
def test_target_params_are_whole_and_exact(ratio, size, expected):
    shapes = [LinearShape("a", size, 1)]
    assert Budget(ratio).target_params(shapes, other_params=0) == expected
    assert Budget(ratio).target_params(shapes, other_params=10**6) == expected


@given(
    hundredths=st.integers(1, 10000),
    sides=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=5),
    other=st.integers(0, 10**6),
)
@relaxed
def test_target_params_against_fractions(hundredths, sides, other):
    ratio = float(f"{hundredths / 10000:.4f}")
    shapes = [LinearShape(f"l{i}", out, inner) for i, (out, inner) in enumerate(sides)]
    size = sum(out * inner for out, inner in sides)
    exact = Fraction(hundredths, 10000)
    assert Budget(ratio).target_params(shapes, other) == exact * size // 1
    left = exact * (size + other) // 1 - other
    of_model = Budget(ratio, scope="model")
    if left > 0:
        assert of_model.target_params(shapes, other) == left
    else:
        with pytest.raises(BudgetError, match="keep more"):
            of_model.target_params(shapes, other)


def test_what_stays_is_told_where_it_is_over_the_budget():
    with pytest.raises(BudgetError, match=r"keep 0\.5 of the model .* that alone is 0\.900"):
        Budget(0.5, scope="model").target_params([LinearShape("a", 10, 10)], other_params=900)


SHAPES = [LinearShape("a", 8, 8), LinearShape("b", 4, 4)]


def test_plan_params_by_hand():
    assert RankPlan({"a": None, "b": None}).params(SHAPES) == 80
    assert RankPlan({"a": 3, "b": 1}).params(SHAPES) == 56
    assert RankPlan({"a": 3, "b": 1, "elsewhere": 5}).params(SHAPES[:1]) == 48


def test_check_takes_a_plan_that_is_just_within():
    RankPlan({"a": 3, "b": 1}).check(SHAPES, Budget(0.7), other_params=0)  # 56 of 56
    RankPlan({"a": None, "b": None}).check(SHAPES, Budget(1.0), other_params=0)
    RankPlan({"a": 2, "b": None}).check(SHAPES, Budget(0.6, multiple_of=2), other_params=0)


@pytest.mark.parametrize(
    ("ranks", "budget", "message"),
    [
        ({"a": 4, "b": 1}, Budget(1.0), "a: rank 4 is out of bounds"),
        ({"a": 3, "b": 0}, Budget(1.0), "b: rank 0 is out of bounds"),
        ({"a": -1, "b": 1}, Budget(1.0), "a: rank -1 is out of bounds"),
        ({"a": 1, "b": None}, Budget(1.0, min_rank=2), "a: rank 1 is out of bounds"),
        ({"a": 3, "b": None}, Budget(1.0, multiple_of=2), "a: rank 3 is no multiple"),
        ({"a": 3, "b": 1}, Budget(0.69), "keeps 56 parameters of 55"),
        ({"a": None, "b": None}, Budget(0.99), "keeps 80 parameters of 79"),
    ],
)
def test_check_refuses(ranks, budget, message):
    with pytest.raises(BudgetError, match=message):
        RankPlan(ranks).check(SHAPES, budget, other_params=0)


def test_check_knows_the_layout():
    shapes = [LinearShape("a", 8, 8, "auto"), LinearShape("b", 4, 4, "auto")]
    RankPlan({"a": 4, "b": 1}).check(shapes, Budget(0.8), other_params=0)  # 56 + 8 of 64
    with pytest.raises(BudgetError, match="keeps 64 parameters of 63"):
        RankPlan({"a": 4, "b": 1}).check(shapes, Budget(0.79), other_params=0)
    with pytest.raises(BudgetError, match="a: rank 5 is out of bounds"):
        RankPlan({"a": 5, "b": 1}).check(shapes, Budget(1.0), other_params=0)


def test_check_counts_the_whole_model_in_scope_model():
    plan = RankPlan({"a": 3, "b": 1})
    plan.check(SHAPES, Budget(0.76, scope="model"), other_params=20)  # 76 of 76
    with pytest.raises(BudgetError, match="keeps 56 parameters of 55"):
        plan.check(SHAPES, Budget(0.75, scope="model"), other_params=20)
