import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import Budget, LinearShape, RankPlan, uniform
from slimrank.errors import BudgetError

relaxed = settings(deadline=None, max_examples=60)

SIDES = st.one_of(st.integers(1, 3), st.integers(1, 300))
LAYOUTS = st.sampled_from(["plain", "pivoted", "auto"])
LINEARS = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6).map(
    lambda sides: [LinearShape(f"l{i}", out, inner) for i, (out, inner) in enumerate(sides)]
)
LINEARS_OF_ANY_LAYOUT = st.lists(st.tuples(SIDES, SIDES, LAYOUTS), min_size=1, max_size=6).map(
    lambda drawn: [LinearShape(f"l{i}", *shape) for i, shape in enumerate(drawn)]
)
RATIOS = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
STEPS = st.sampled_from([1, 2, 3, 8])
SCOPES = st.sampled_from(["targets", "model"])


def planned(shapes, budget, other=0):
    """The ranks, or None where the budget cannot be met."""
    try:
        return uniform(shapes, budget, other).ranks
    except BudgetError:
        return None


def as_number(rank):
    return math.inf if rank is None else rank


# by hand

LLAMA_3_8B = [
    LinearShape("q", 4096, 4096),
    LinearShape("k", 1024, 4096),
    LinearShape("v", 1024, 4096),
    LinearShape("o", 4096, 4096),
    LinearShape("gate", 14336, 4096),
    LinearShape("up", 14336, 4096),
    LinearShape("down", 4096, 14336),
]
QWEN3_4B = [
    LinearShape("q", 4096, 2560),
    LinearShape("k", 1024, 2560),
    LinearShape("v", 1024, 2560),
    LinearShape("o", 2560, 4096),
    LinearShape("gate", 9728, 2560),
    LinearShape("up", 9728, 2560),
    LinearShape("down", 2560, 9728),
]
OPT_1_3B = [
    *(LinearShape(name, 2048, 2048) for name in ("q", "k", "v", "o")),
    LinearShape("fc1", 8192, 2048),
    LinearShape("fc2", 2048, 8192),
]


@pytest.mark.parametrize(
    ("shapes", "budget", "expected"),
    [
        # 0.8 x 2048; 0.8 x 819.2; 0.8 x 3185.78
        (LLAMA_3_8B, Budget(0.8), [1638, 655, 655, 1638, 2548, 2548, 2548]),
        (LLAMA_3_8B, Budget(0.8, multiple_of=8), [1632, 648, 648, 1632, 2544, 2544, 2544]),
        # 0.6 x 1575.38; 0.6 x 731.43; 0.6 x 6080 / 3 is 1216 exactly
        (QWEN3_4B, Budget(0.6), [945, 438, 438, 945, 1216, 1216, 1216]),
        (QWEN3_4B, Budget(0.6, multiple_of=64), [896, 384, 384, 896, 1216, 1216, 1216]),
        # 0.7 x 1024; 0.7 x 1638.4
        (OPT_1_3B, Budget(0.7), [716, 716, 716, 716, 1146, 1146]),
        (OPT_1_3B, Budget(0.5), [512, 512, 512, 512, 819, 819]),
    ],
)
def test_ranks_of_real_models_by_hand(shapes, budget, expected):
    plan = uniform(shapes, budget)
    assert list(plan.ranks) == [shape.name for shape in shapes]
    assert list(plan.ranks.values()) == expected


def test_scope_model_of_llama_3_8b_by_hand():
    """8 030 261 248 parameters, 1 050 939 392 outside the linears; 0.8 leaves 0.769884 of these."""
    shapes = [
        LinearShape(f"{layer}.{s.name}", s.out_features, s.in_features)
        for layer in range(32)
        for s in LLAMA_3_8B
    ]
    total, other = 8030261248, 2 * 128256 * 4096 + 65 * 4096
    assert sum(s.dense_params for s in shapes) + other == total
    plan = uniform(shapes, Budget(0.8, scope="model"), other)
    assert [plan.ranks[f"31.{s.name}"] for s in LLAMA_3_8B] == [
        1576, 630, 630, 1576, 2452, 2452, 2452,
    ]  # fmt: skip
    kept = (plan.params(shapes) + other) / total
    assert 0.799 < kept <= 0.8


@pytest.mark.parametrize(
    ("ratio", "side", "expected"),
    # ratio x side / 2 is a whole number, which floats miss from below for 0.29 and 0.57
    [(0.7, 20, 7), (0.29, 200, 29), (0.57, 200, 57), (1e-3, 2000, 1), (0.1, 60, 3)],
)
def test_whole_ranks_are_hit_exactly(ratio, side, expected):
    assert uniform([LinearShape("a", side, side)], Budget(ratio)).ranks == {"a": expected}


def test_a_whole_rank_is_hit_whatever_the_others_are():
    """The documented floor(rho out in / (out + in)): 0.3 x 10 and 0.3 x 3.5."""
    shapes = [LinearShape("a", 20, 20), LinearShape("b", 7, 7)]
    assert uniform(shapes, Budget(0.3)).ranks == {"a": 3, "b": 1}


def test_a_row_stays_dense_and_the_others_pay_for_it():
    """100 + 5 parameters, 0.6 is 63: the row keeps 5, which leaves 58 for steps of 20."""
    shapes = [LinearShape("square", 10, 10), LinearShape("row", 1, 5)]
    plan = uniform(shapes, Budget(0.6))
    assert plan.ranks == {"square": 2, "row": None}
    assert plan.params(shapes) == 45


def test_keep_all_leaves_all_dense():
    for scope in ("targets", "model"):
        plan = uniform(LLAMA_3_8B, Budget(1.0, scope=scope, multiple_of=8), other_params=12345)
        assert set(plan.ranks.values()) == {None}


def test_no_linears_make_an_empty_plan():
    assert uniform([], Budget(0.5)).ranks == {}


# by property


@given(
    shapes=LINEARS, ratio=RATIOS, step=STEPS, least=st.integers(1, 5), scope=SCOPES, data=st.data()
)
@relaxed
def test_a_plan_is_within_its_budget_and_close_to_it(shapes, ratio, step, least, scope, data):
    other = data.draw(st.integers(0, 2000), label="other")
    budget = Budget(ratio, scope=scope, multiple_of=step, min_rank=least)
    try:
        plan = uniform(shapes, budget, other)
    except BudgetError:
        return
    assert set(plan.ranks) == {shape.name for shape in shapes}
    kept, size = plan.params(shapes), sum(shape.dense_params for shape in shapes)
    stays = other if scope == "model" else 0
    assert kept + stays <= Fraction(str(ratio)) * (size + stays)
    factorised = [shape for shape in shapes if plan.ranks[shape.name] is not None]
    for shape in factorised:
        rank = plan.ranks[shape.name]
        assert budget.smallest_rank <= rank <= shape.break_even_rank
        assert rank % step == 0
        assert shape.params(rank) < shape.dense_params
    if factorised:
        # less than one step of rank per linear, and less than one parameter lost to whole numbers
        slack = sum(step * shape.params(1) for shape in factorised)
        assert kept + stays > Fraction(str(ratio)) * (size + stays) - slack - 1
        for shape in shapes:
            if shape not in factorised:
                assert shape.break_even_rank < budget.smallest_rank
    elif size:
        assert kept == size
    plan.check(shapes, budget, other)


@given(shapes=LINEARS, ratio=RATIOS, step=STEPS, scope=SCOPES, other=st.integers(0, 2000))
@relaxed
def test_every_linear_gets_the_same_share(shapes, ratio, step, scope, other):
    budget = Budget(ratio, scope=scope, multiple_of=step)
    ranks = planned(shapes, budget, other)
    if ranks is None:
        return
    # some one share lies within what every rank allows: rank <= share * break-even < rank + step
    bounds = [
        (
            Fraction(ranks[s.name] * s.params(1), s.dense_params),
            Fraction((ranks[s.name] + step) * s.params(1), s.dense_params),
        )
        for s in shapes
        if ranks[s.name] is not None
    ]
    if bounds:
        assert max(low for low, _ in bounds) < min(high for _, high in bounds)


@given(shapes=LINEARS, ratio=RATIOS, step=STEPS, data=st.data())
@relaxed
def test_relabelling_linears_relabels_the_plan(shapes, ratio, step, data):
    order = data.draw(st.permutations(range(len(shapes))), label="order")
    budget = Budget(ratio, multiple_of=step)
    renamed = [LinearShape(f"new{i}", shapes[i].out_features, shapes[i].in_features) for i in order]
    before, after = planned(shapes, budget), planned(renamed, budget)
    if before is None:
        assert after is None
    else:
        assert after == {f"new{i}": before[f"l{i}"] for i in order}


@given(
    shapes=LINEARS,
    first=RATIOS,
    second=RATIOS,
    step=STEPS,
    scope=SCOPES,
    other=st.integers(0, 2000),
)
@relaxed
def test_a_larger_budget_never_gives_a_smaller_rank(shapes, first, second, step, scope, other):
    small, large = sorted((first, second))
    less = planned(shapes, Budget(small, scope=scope, multiple_of=step), other)
    more = planned(shapes, Budget(large, scope=scope, multiple_of=step), other)
    if less is not None:
        assert more is not None
        for name in less:
            assert as_number(less[name]) <= as_number(more[name])


@given(shapes=LINEARS, ratio=RATIOS, step=STEPS, scope=SCOPES, other=st.integers(0, 2000))
@relaxed
def test_the_share_that_an_error_names_works(shapes, ratio, step, scope, other):
    try:
        uniform(shapes, Budget(ratio, scope=scope, multiple_of=step), other)
    except BudgetError as error:
        message = str(error)
        if "keep more" in message:  # what no target holds is over the budget: no share is named
            return
        named = float(message.rpartition("the smallest share that works is ")[2])
        assert named > ratio
        uniform(shapes, Budget(named, scope=scope, multiple_of=step), other)


@pytest.mark.parametrize("scope", ["targets", "model"])
@pytest.mark.parametrize("step", [1, 8, 64])
def test_the_share_that_an_error_names_works_for_a_real_model(scope, step):
    other = 10**7  # 0.0902 of the model
    with pytest.raises(BudgetError, match=f"is below rank {step} ") as caught:
        uniform(QWEN3_4B, Budget(0.0905 if scope == "model" else 1e-4, scope, step, 1), other)
    named = float(str(caught.value).rpartition(" ")[2])
    plan = uniform(QWEN3_4B, Budget(named, scope, step, 1), other)
    assert min(as_number(rank) for rank in plan.ranks.values()) >= step
    if named > 0.0002:
        with pytest.raises(BudgetError):
            uniform(QWEN3_4B, Budget(round(named - 2e-4, 4), scope, step, 1), other)


def test_the_share_is_a_whole_one_where_no_linear_can_shrink():
    shapes = [LinearShape("row", 1, 5)]
    with pytest.raises(BudgetError) as caught:
        uniform(shapes, Budget(0.5))
    named = float(str(caught.value).rpartition(" ")[2])
    assert named == 1.0


@given(shapes=LINEARS_OF_ANY_LAYOUT, ratio=RATIOS, step=STEPS, least=st.integers(1, 5))
@relaxed
def test_any_layout_is_within_its_budget_and_close_to_it(shapes, ratio, step, least):
    budget = Budget(ratio, multiple_of=step, min_rank=least)
    ranks = planned(shapes, budget)
    if ranks is None:
        return
    plan = RankPlan(ranks)
    plan.check(shapes, budget, 0)
    # no linear could have one step more by the share that is the least of the next ones
    free = [s for s in shapes if ranks[s.name] is not None]
    if free:
        larger = [Fraction(s.params(ranks[s.name] + step), s.dense_params) for s in free]
        share = [Fraction(s.params(ranks[s.name]), s.dense_params) for s in free]
        capped = [ranks[s.name] + step > s.full_rank for s in free]
        rising = [x for x, cap in zip(larger, capped, strict=True) if not cap]
        assert max(share) < min(rising, default=2)


def test_the_pivoted_layout_by_hand():
    """0.8 x 400 is 320, and so is 10 (20 + 20 - 10 + 2)."""
    shape = LinearShape("a", 20, 20, layout="pivoted")
    assert uniform([shape], Budget(0.8)).ranks == {"a": 10}
    assert uniform([shape], Budget(0.79)).ranks == {"a": 9}


# with ranks that are fixed


def holding(shapes, data):
    """Fixed ranks for some of the linears, break-even or not."""
    named = data.draw(st.lists(st.sampled_from(shapes), min_size=1, unique=True), label="held")
    return {
        s.name: data.draw(st.integers(1, min(s.out_features, s.in_features)), label=s.name)
        for s in named
    }


@pytest.mark.parametrize(
    ("budget", "fixed", "expected"),
    [
        # 960 of 1200; a 10 x 40 takes 50 a rank, a 20 x 20 takes 40
        # 10 · 50 is over its 400: 460 are left to 800, so 5.75 each
        (Budget(0.8), {"k": 10}, [5, 5, 10]),
        # 2 · 50: 860 are left to 800
        (Budget(0.8), {"k": 2}, [None, None, 2]),
        # 3 · 50: 810 are left, still all; 4 · 50: 760 of 800, so 9.5 each
        (Budget(0.8), {"k": 3}, [None, None, 3]),
        (Budget(0.8), {"k": 4}, [9, 9, 4]),
        # neither multiple nor least rank touch a fixed one
        (Budget(0.8, multiple_of=4, min_rank=4), {"k": 10}, [4, 4, 10]),
        (Budget(0.8, multiple_of=4, min_rank=4), {"k": 3}, [None, None, 3]),
        # 20 · 40 + 2 · 50 leave 60 to q of 400: 1.5
        (Budget(0.8), {"o": 20, "k": 2}, [1, 20, 2]),
        # everything is kept: 500 for k in place of 400 is over 1200, and allowed
        (Budget(1.0), {"k": 10}, [None, None, 10]),
        (Budget(1.0, scope="model"), {"k": 10, "o": 20}, [None, 20, 10]),
        (Budget(1.0), {"k": 1}, [None, None, 1]),
        # 0.8 of 1300 less 100 is 940; 440 of 800, so 5.5 each
        (Budget(0.8, scope="model"), {"k": 10}, [5, 5, 10]),
        (Budget(0.8), {}, [8, 8, 6]),
    ],
)
def test_fixed_ranks_by_hand(budget, fixed, expected):
    shapes = [LinearShape("q", 20, 20), LinearShape("o", 20, 20), LinearShape("k", 10, 40)]
    plan = uniform(shapes, budget, other_params=100, fixed=fixed)
    assert plan.ranks == dict(zip(["q", "o", "k"], expected, strict=True))


@given(
    shapes=LINEARS, ratio=RATIOS, step=STEPS, least=st.integers(1, 5), scope=SCOPES, data=st.data()
)
@relaxed
def test_fixed_ranks_come_back_and_the_budget_holds(shapes, ratio, step, least, scope, data):
    fixed = holding(shapes, data)
    other = data.draw(st.integers(0, 2000), label="other")
    budget = Budget(ratio, scope=scope, multiple_of=step, min_rank=least)
    try:
        plan = uniform(shapes, budget, other, fixed)
    except BudgetError:
        return
    assert list(plan.ranks) == [shape.name for shape in shapes]
    assert {name: plan.ranks[name] for name in fixed} == fixed
    size = sum(s.dense_params for s in shapes)
    stays = other if scope == "model" else 0
    if ratio < 1:
        assert plan.params(shapes) + stays <= Fraction(str(ratio)) * (size + stays)
    free = [s for s in shapes if s.name not in fixed]
    factorised = [s for s in free if plan.ranks[s.name] is not None]
    if factorised:
        slack = sum(step * s.params(1) for s in factorised)
        assert plan.params(shapes) + stays > Fraction(str(ratio)) * (size + stays) - slack - 1
    for s in factorised:
        assert budget.smallest_rank <= plan.ranks[s.name] <= s.break_even_rank
        assert plan.ranks[s.name] % step == 0


@given(shapes=LINEARS, ratio=RATIOS, step=STEPS, scope=SCOPES, data=st.data())
@relaxed
def test_linears_that_are_not_fixed_get_the_same_share(shapes, ratio, step, scope, data):
    """The plan is that of the others alone, with what the fixed ones leave as the whole budget."""
    fixed = holding(shapes, data)
    other = data.draw(st.integers(0, 2000), label="other")
    budget = Budget(ratio, scope=scope, multiple_of=step)
    try:
        plan = uniform(shapes, budget, other, fixed)
    except BudgetError:
        return
    free = [s for s in shapes if s.name not in fixed]
    cost = sum(s.params(fixed[s.name]) for s in shapes if s.name in fixed)
    shrinkable = [s for s in free if step <= s.break_even_rank]
    size = sum(s.dense_params for s in shrinkable)
    stays = sum(s.dense_params for s in free) - size
    share = (budget.allowance(shapes, other) - cost - stays) / size if size else Fraction(1)
    for s in free:
        if ratio == 1 or share >= 1 or s not in shrinkable:
            assert plan.ranks[s.name] is None
        else:
            most = share * s.dense_params / s.params(1)
            assert plan.ranks[s.name] <= most < plan.ranks[s.name] + step


@given(shapes=LINEARS, ratio=RATIOS, step=STEPS, scope=SCOPES, data=st.data())
@relaxed
def test_the_share_that_an_error_names_works_with_fixed_ranks(shapes, ratio, step, scope, data):
    fixed = holding(shapes, data)
    other = data.draw(st.integers(0, 2000), label="other")
    try:
        uniform(shapes, Budget(ratio, scope=scope, multiple_of=step), other, fixed)
    except BudgetError as error:
        message = str(error)
        if "keep more" in message:  # what no target holds is over the budget: no share is named
            return
        assert "the fixed ranks (" in message
        named = float(message.rpartition("the smallest share that works is ")[2])
        assert ratio < named <= 1
        uniform(shapes, Budget(named, scope=scope, multiple_of=step), other, fixed)


def test_an_error_names_what_the_fixed_ranks_take():
    """0.4 of 800 is 320: the fixed ones take 300 of it, and q needs 40; 340 is 0.425 of 800."""
    shapes = [LinearShape("q", 20, 20), LinearShape("k", 10, 20), LinearShape("v", 10, 20)]
    message = (
        r"keep 0\.4 is below rank 1 for some linear \(q is the first\): the fixed ranks "
        r"\(k and 1 more\) take 300 of the 320 parameters that it allows; "
        r"the smallest share that works is 0\.4250"
    )
    with pytest.raises(BudgetError, match=message):
        uniform(shapes, Budget(0.4), fixed={"k": 5, "v": 5})
    assert uniform(shapes, Budget(0.425), fixed={"k": 5, "v": 5}).ranks["q"] == 1


def test_an_error_says_where_the_fixed_ranks_are_all_there_is():
    message = (
        r"keep 0\.5 is too little: the fixed ranks \(k\) take 150 of the 100 parameters that it "
        r"allows; the smallest share that works is 0\.7500"
    )
    with pytest.raises(BudgetError, match=message):
        uniform([LinearShape("k", 10, 20)], Budget(0.5), fixed={"k": 5})


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"k": 0}, "k: fixed rank 0 is not within 1 and 10"),
        ({"k": 11}, "k: fixed rank 11 is not within 1 and 10"),
        ({"kv": 3}, "kv: rank 3 is fixed, but no targeted linear has this name"),
    ],
)
@pytest.mark.parametrize("ratio", [0.01, 0.9, 1.0])
def test_fixed_ranks_that_no_linear_can_have_are_refused(fixed, message, ratio):
    with pytest.raises(BudgetError, match=message):
        uniform([LinearShape("k", 10, 40)], Budget(ratio), fixed=fixed)


HELD = [LinearShape("a", 8, 8), LinearShape("b", 4, 4)]


@pytest.mark.parametrize(
    ("ranks", "budget", "fixed"),
    [
        ({"a": 8, "b": None}, Budget(1.0), {"a": 8}),  # 144 of 80, 64 of it for a over dense
        ({"a": 8, "b": None}, Budget(1.0, scope="model"), {"a": 8}),
        ({"a": None, "b": 4}, Budget(1.0, min_rank=3, multiple_of=3), {"b": 4}),
        ({"a": 1, "b": 4}, Budget(0.6), {"b": 4}),  # 48 of 48
    ],
)
def test_check_takes_fixed_ranks(ranks, budget, fixed):
    RankPlan(ranks).check(HELD, budget, 20, fixed)


@pytest.mark.parametrize(
    ("ranks", "budget", "fixed", "message"),
    [
        ({"a": 3, "b": None}, Budget(1.0), {"a": 4}, "a: rank 3 is fixed at 4"),
        ({"a": None, "b": None}, Budget(1.0), {"a": 4}, "a: rank None is fixed at 4"),
        ({"a": 8, "b": None}, Budget(1.0), None, "a: rank 8 is out of bounds"),
        ({"a": 8, "b": 4}, Budget(1.0), {"a": 8}, "b: rank 4 is out of bounds"),
        ({"a": 9, "b": None}, Budget(1.0), {"a": 9}, "a: fixed rank 9 is not within 1 and 8"),
        ({"a": 2, "b": 4}, Budget(0.79), {"b": 4}, "keeps 64 parameters of 63"),
        ({"a": 8, "b": None}, Budget(0.99), {"a": 8}, "keeps 144 parameters of 79"),
    ],
)
def test_check_refuses_beside_fixed_ranks(ranks, budget, fixed, message):
    with pytest.raises(BudgetError, match=message):
        RankPlan(ranks).check(HELD, budget, 20, fixed)


def test_the_excess_at_keep_all_is_that_of_the_fixed_ranks_together():
    """Of 64 and 16: a is 16 over dense and b 8 under, so the sum is 8 over, and allowed."""
    fixed = {"a": 5, "b": 1}
    plan = uniform(HELD, Budget(1.0), fixed=fixed)
    assert plan.params(HELD) == 80 + 16 - 8
    plan.check(HELD, Budget(1.0), 0, fixed)
