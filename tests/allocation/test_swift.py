import math
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import Budget, LinearProfile, LinearShape, swift, uniform
from slimrank.errors import BudgetError

relaxed = settings(deadline=None, max_examples=60)
E = math.e


def spectrum(side, residual=0.0, rank=0):
    """Squares that add up to residual² beyond the rank, all of them in the next value."""
    values = torch.zeros(side, dtype=torch.float64)
    values[: rank + 1] = residual
    return values


def square(importances, residuals=None, side=40, rank=0, kind="q"):
    """A square linear of one kind in each block; one token, so residuals are as given."""
    residuals = residuals or [0.0] * len(importances)
    return [
        LinearProfile(
            LinearShape(f"{i}.{kind}", side, side), kind, i, spectrum(side, residual, rank), 1, beta
        )
        for i, (beta, residual) in enumerate(zip(importances, residuals, strict=True))
    ]


def ranks(profiles, budget, **others):
    return list(swift(profiles, budget, **others).ranks.values())


def pools_of(profiles):
    pools = defaultdict(list)
    for p in profiles:
        pools[p.kind, p.shape.out_features, p.shape.in_features].append(p)
    return list(pools.values())


# by hand


@pytest.mark.parametrize(
    ("importances", "budget", "expected"),
    [
        # k̄ 10, floors 5, pool 15; β 1, 4/3, 2 of 13/3: 3.46, 4.62, 6.92; last steps to .92 and .62
        ([0.0, 1.0, 3.0], Budget(0.5), [8, 10, 12]),
        # k̄ 16, floors 8, pool 24, room 11; β 1, 1.25, 2 of 4.25: the third wants 11.29 and gets 11,
        # which leaves 13 to 1 : 1.25 and so 5.78 and 7.22
        ([0.0, 0.25, 1.0], Budget(0.8), [14, 15, 19]),
        # k̄ 12, floors ⌊6⌋ to 4, pool 6 steps, room 3: 1.41, 1.76, 2.82; to .82 and .76
        ([0.0, 0.25, 1.0], Budget(0.6, multiple_of=4), [8, 12, 16]),
        # the smallest rank lifts the floors to 8: pool 6, room 11; 1.41, 1.76, 2.82
        ([0.0, 0.25, 1.0], Budget(0.5, min_rank=8), [9, 10, 11]),
    ],
)
def test_importance_alone_by_hand(importances, budget, expected):
    assert ranks(square(importances), budget, importance_weight=1.0) == expected


def test_both_signals_by_hand():
    """β 1, 2, 1 and ln(e + ε) 1, 2, 4 at α ½: scores 1, 2, 2 of a pool of 15."""
    profiles = square([0.0, 1.0, 0.0], [0.0, E**2 - E, E**4 - E], rank=10)
    assert ranks(profiles, Budget(0.5), importance_weight=0.5) == [8, 11, 11]


def test_loss_alone_by_hand():
    """ln(e + ε) 1, 2, 2 of a pool of 15."""
    profiles = square([9.0, 3.0, 0.0], [0.0, E**2 - E, E**2 - E], rank=10)
    assert ranks(profiles, Budget(0.5), importance_weight=0.0) == [8, 11, 11]


def test_the_residual_is_that_of_the_uniform_rank_and_of_all_tokens():
    """Energy within the first k̄ values does not count; energy beyond it counts per token.

    100 tokens of mean square ((e² − e) / 10)² are a residual of e² − e, so scores are 1 and 2.
    """
    inside = spectrum(40, residual=1e9, rank=9)
    beyond = spectrum(40, residual=(E**2 - E) / 10, rank=10)
    profiles = [
        LinearProfile(LinearShape(f"{i}.q", 40, 40), "q", i, values, 100, 0.0)
        for i, values in enumerate([inside, beyond])
    ]
    found = ranks(profiles, Budget(0.5), importance_weight=0.0, retained_share=0.4)
    assert found == [8, 12]  # floors 4, pool 12


def test_importance_is_normalised_over_all_blocks_and_not_within_a_kind():
    """Blocks of 0, 1 and 3: the pool of blocks 0 and 1 is shared as 1 : 4/3, not as 1 : 2."""
    few = square([0.0, 1.0])
    other = square([0.0, 1.0, 3.0], kind="o")[2:]
    found = swift([*few, *other], Budget(0.5), importance_weight=1.0, retained_share=0.3).ranks
    assert found == {"0.q": 9, "1.q": 11, "2.o": 10}  # floors 3, pool 14: exactly 6 and 8


def test_kinds_do_not_share_though_they_are_alike():
    """Within each kind the losses are equal; one pool of both would favour the kind with any."""
    quiet = square([0.0, 0.0], kind="k")
    loud = square([0.0, 0.0], [99.0, 99.0], kind="v", rank=10)
    found = swift([*quiet, *loud], Budget(0.5), importance_weight=0.0).ranks
    assert set(found.values()) == {10}


def test_shapes_of_one_kind_do_not_share():
    """As in models whose blocks differ: each shape has a uniform rank of its own."""
    narrow = square([0.0, 0.0], side=20)
    wide = [
        LinearProfile(LinearShape(f"wide{i}", 40, 40), "q", 2 + i, spectrum(40), 1, 1.0)
        for i in range(2)
    ]
    assert ranks([*narrow, *wide], Budget(0.5), importance_weight=1.0) == [5, 5, 10, 10]


def test_equal_scores_and_remainders_go_by_position():
    """Shared as 1 : 2 : 1; a step that two have the same claim to goes to the first of them."""
    profiles = square([0.0, 1.0, 0.0])
    # k̄ 10, floors 8, pool 6: 1.5, 3, 1.5
    found = ranks(profiles, Budget(0.5), importance_weight=1.0, retained_share=0.8)
    assert found == [10, 11, 9]
    # k̄ 16, floors 8, pool 24, room 11: 6, 12, 6, of which 12 is cut to 11, which leaves 6.5 each
    assert ranks(profiles, Budget(0.8), importance_weight=1.0) == [15, 19, 14]


def test_equal_remainders_of_unequal_scores_go_to_the_larger():
    """k̄ 12, floors 6, pool 30; β 1, 1.125, 1.375, 2, 2 of 7.5: 4, 4.5, 5.5, 8, 8, all exact."""
    profiles = square([0.0, 0.125, 0.375, 1.0, 1.0])
    assert ranks(profiles, Budget(0.6), importance_weight=1.0) == [10, 10, 12, 14, 14]


def test_keep_all_leaves_all_dense():
    assert set(ranks(square([0.0, 1.0]), Budget(1.0), importance_weight=0.5)) == {None}


def test_no_linears_make_an_empty_plan():
    assert swift([], Budget(0.5), importance_weight=0.5).ranks == {}


def test_one_block_gets_the_uniform_rank():
    assert ranks(square([7.0]), Budget(0.5), importance_weight=0.5) == [10]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
@pytest.mark.parametrize("name", ["importance_weight", "retained_share"])
def test_weights_outside_their_range_are_refused(name, value):
    with pytest.raises(BudgetError, match=rf"{name} lies in \[0, 1\], not "):
        swift(square([0.0, 1.0]), Budget(0.5), **{"importance_weight": 0.5, name: value})


def test_fixed_ranks_take_no_part_in_a_pool():
    """0.9 of 4800 is 4320; 30 · 80 are fixed, above break-even; 1920 are left to two of 1600.

    So k̄ is 12, floors 6, and the pool of 12 goes as 1 : 2.
    """
    profiles = square([0.0, 1.0, 0.5])
    found = swift(profiles, Budget(0.9), importance_weight=1.0, fixed={"2.q": 30})
    assert found.ranks == {"0.q": 10, "1.q": 14, "2.q": 30}


def test_the_importance_of_fixed_linears_still_counts_in_the_range():
    """Block 2 holds no free linear, but it is a block: the others have β 1 and 1.5."""
    profiles = square([0.0, 1.0, 2.0])
    found = swift(profiles, Budget(0.9), importance_weight=1.0, fixed={"2.q": 30})
    assert found.ranks == {"0.q": 11, "1.q": 13, "2.q": 30}  # 12 · 2/5 is 4.8, and 7.2


def test_fixed_ranks_beside_dense_ones_at_keep_all():
    found = swift(square([0.0, 1.0]), Budget(1.0), importance_weight=1.0, fixed={"1.q": 40})
    assert found.ranks == {"0.q": None, "1.q": 40}


@pytest.mark.parametrize("layout", ["pivoted", "auto"])
def test_the_pivoted_layout_keeps_the_sum_and_costs_no_more(layout):
    """0.5 x 1600 is 800: rank 11 costs 781 and 12 840; floors 5, pool 18 as 1 : 4/3 : 2."""
    profiles = [
        LinearProfile(
            LinearShape(p.shape.name, 40, 40, layout),
            "q",
            p.block,
            p.singular_values,
            1,
            p.importance,
        )
        for p in square([0.0, 1.0, 3.0])
    ]
    shapes = [p.shape for p in profiles]
    even = uniform(shapes, Budget(0.5))
    assert set(even.ranks.values()) == {11}
    plan = swift(profiles, Budget(0.5), importance_weight=1.0)
    assert list(plan.ranks.values()) == [9, 11, 13]
    assert plan.params(shapes) < even.params(shapes)


# the authors' own overspends

OPT_6_7B = {name: (4096, 4096) for name in ("q", "k", "v", "o")} | {
    "fc1": (16384, 4096),
    "fc2": (4096, 16384),
}
MISTRAL_7B = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
QWEN3_4B = {
    "q": (4096, 2560),
    "k": (1024, 2560),
    "v": (1024, 2560),
    "o": (2560, 4096),
    "gate": (9728, 2560),
    "up": (9728, 2560),
    "down": (2560, 9728),
}


def whole_model(shapes, blocks):
    """Spectra that fall off differently in every block; importance high at both ends."""
    profiles = []
    for block in range(blocks):
        middle = 2 * block / (blocks - 1) - 1
        for kind, (out, inner) in shapes.items():
            index = torch.arange(1, min(out, inner) + 1, dtype=torch.float64)
            values = 50 * index ** -(0.3 + 0.6 * block / blocks)
            shape = LinearShape(f"{block}.{kind}", out, inner)
            profiles.append(LinearProfile(shape, kind, block, values, 2**19, 0.05 + middle**4))
    return profiles


@pytest.mark.parametrize("importance_weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("keep", [0.8, 0.6])
@pytest.mark.parametrize(
    ("model", "blocks"), [(OPT_6_7B, 32), (MISTRAL_7B, 32), (QWEN3_4B, 36)], ids=["opt", "mi", "qw"]
)
def test_shapes_that_the_authors_code_overspends_on(model, blocks, keep, importance_weight):
    """Its floor of a quarter of ρ · out is over the whole uniform rank, or near it, for these."""
    profiles = whole_model(model, blocks)
    shapes = [p.shape for p in profiles]
    budget = Budget(keep)
    plan = swift(profiles, budget, importance_weight=importance_weight)
    even = uniform(shapes, budget)
    size = sum(s.dense_params for s in shapes)
    assert plan.params(shapes) == even.params(shapes)
    assert 0.999 * keep < plan.params(shapes) / size <= keep
    for shape in shapes:
        assert even.ranks[shape.name] // 2 <= plan.ranks[shape.name] <= shape.break_even_rank
    assert plan.ranks != even.ranks


def test_the_figures_of_those_overspends():
    """What makes the cases above hard: floors of the authors' code against uniform ranks."""
    for model, kind in ((OPT_6_7B, "fc1"), (MISTRAL_7B, "gate"), (QWEN3_4B, "up")):
        out, inner = model[kind]
        fair = uniform([LinearShape(kind, out, inner)], Budget(0.8)).ranks[kind]
        assert int(0.25 * 0.8 * out) > fair


# by property


@st.composite
def models(draw):
    """Blocks of up to three kinds, fc1 four times wide, k narrow; spectra and importances drawn."""
    hidden = draw(st.integers(4, 60), label="hidden")
    narrow = draw(st.integers(1, hidden), label="narrow")
    kinds = draw(
        st.lists(st.sampled_from(["q", "k", "fc1", "fc2"]), min_size=1, max_size=3, unique=True)
    )
    sides = {
        "q": (hidden, hidden),
        "k": (narrow, hidden),
        "fc1": (4 * hidden, hidden),
        "fc2": (hidden, 4 * hidden),
    }
    blocks = draw(st.integers(1, 5), label="blocks")
    profiles = []
    for block in range(blocks):
        importance = draw(st.integers(0, 64), label="importance") / 64
        for kind in kinds:
            out, inner = sides[kind]
            decay = draw(st.floats(0, 3), label="decay")
            scale = draw(st.floats(0, 100), label="scale")
            values = scale * torch.arange(1, min(out, inner) + 1, dtype=torch.float64) ** -decay
            tokens = draw(st.integers(1, 1000), label="tokens")
            shape = LinearShape(f"{block}.{kind}", out, inner)
            profiles.append(LinearProfile(shape, kind, block, values, tokens, importance))
    return profiles


SHARES = st.integers(0, 20).map(lambda twentieths: twentieths / 20)
RATIOS = st.integers(5, 100).map(lambda hundredths: hundredths / 100)
BUDGETS = st.builds(
    Budget,
    param_ratio=RATIOS,
    scope=st.sampled_from(["targets", "model"]),
    multiple_of=st.sampled_from([1, 2, 3, 8]),
    min_rank=st.integers(1, 4),
)


def both(profiles, budget, **others):
    """The uniform ranks and the dynamic ones, or None where the budget cannot be met."""
    shapes = [p.shape for p in profiles]
    fixed = others.get("fixed")
    try:
        even = uniform(shapes, budget, 50, fixed).ranks
    except BudgetError:
        with pytest.raises(BudgetError):
            swift(profiles, budget, 50, **others)
        return None
    return even, swift(profiles, budget, 50, **others).ranks


def scores_of(pool, profiles, rank, importance_weight):
    """Equation 12, in floats."""
    low = min(p.importance for p in profiles)
    high = max(p.importance for p in profiles)
    result = []
    for p in pool:
        beta = 1 + (p.importance - low) / (high - low) if high > low else 1.0
        left = math.sqrt(p.tokens * math.fsum(float(v) ** 2 for v in p.singular_values[rank:]))
        result.append(beta**importance_weight * math.log(E + left) ** (1 - importance_weight))
    return result


@given(profiles=models(), budget=BUDGETS, weight=SHARES, retained=SHARES)
@relaxed
def test_every_pool_has_the_sum_and_bounds_of_its_budget(profiles, budget, weight, retained):
    found = both(profiles, budget, importance_weight=weight, retained_share=retained)
    if found is None:
        return
    even, plan = found
    assert list(plan) == list(even)
    step = budget.multiple_of
    for pool in pools_of(profiles):
        names = [p.shape.name for p in pool]
        fair = even[names[0]]
        if fair is None:
            assert [plan[name] for name in names] == [None] * len(names)
            continue
        assert sum(plan[name] for name in names) == len(names) * fair
        floor = Fraction(str(retained)) * fair
        for name in names:
            assert plan[name] % step == 0
            assert budget.smallest_rank <= plan[name] <= pool[0].shape.break_even_rank
            assert plan[name] > floor - step


@given(profiles=models(), budget=BUDGETS, weight=SHARES, retained=SHARES)
@relaxed
def test_what_is_above_the_floor_is_in_proportion_to_scores(profiles, budget, weight, retained):
    """Some one price lies within what every rank allows, to a step; at the cap only from below."""
    found = both(profiles, budget, importance_weight=weight, retained_share=retained)
    if found is None:
        return
    even, plan = found
    step = budget.multiple_of
    for pool in pools_of(profiles):
        fair = even[pool[0].shape.name]
        if fair is None:
            continue
        scores = scores_of(pool, profiles, fair, weight)
        floor = max(math.floor(Fraction(str(retained)) * fair / step) * step, budget.smallest_rank)
        cap = pool[0].shape.break_even_rank // step * step
        dealt = [plan[p.shape.name] - floor for p in pool]
        lower = [(extra - step) / score for extra, score in zip(dealt, scores, strict=True)]
        upper = [
            math.inf if floor + extra == cap else (extra + step) / score
            for extra, score in zip(dealt, scores, strict=True)
        ]
        assert max(lower) <= min(upper) * (1 + 1e-9)
        for i, score in enumerate(scores):
            for j, other in enumerate(scores):
                if score > other * (1 + 1e-9):
                    assert dealt[i] >= dealt[j]


@given(profiles=models(), budget=BUDGETS, weight=SHARES)
@relaxed
def test_to_retain_all_is_uniform(profiles, budget, weight):
    found = both(profiles, budget, importance_weight=weight, retained_share=1.0)
    if found is not None:
        assert found[0] == found[1]


def changed(profiles, importances=None, spectra=None):
    """The same linears with other importances of their blocks, or other spectra."""
    return [
        LinearProfile(
            p.shape,
            p.kind,
            p.block,
            p.singular_values if spectra is None else p.singular_values * spectra[i],
            p.tokens,
            p.importance if importances is None else importances[p.block],
        )
        for i, p in enumerate(profiles)
    ]


@given(profiles=models(), budget=BUDGETS, data=st.data())
@relaxed
def test_without_weight_importance_does_not_count(profiles, budget, data):
    drawn = data.draw(st.lists(st.floats(-9, 9), min_size=5, max_size=5), label="importances")
    found = both(profiles, budget, importance_weight=0.0)
    assert found == both(changed(profiles, importances=drawn), budget, importance_weight=0.0)


@given(profiles=models(), budget=BUDGETS, data=st.data())
@relaxed
def test_with_all_weight_loss_does_not_count(profiles, budget, data):
    count = len(profiles)
    drawn = data.draw(st.lists(st.floats(0, 99), min_size=count, max_size=count), label="scales")
    found = both(profiles, budget, importance_weight=1.0)
    assert found == both(changed(profiles, spectra=drawn), budget, importance_weight=1.0)


@given(profiles=models(), budget=BUDGETS, weight=SHARES, shift=st.integers(-4, 4))
@relaxed
def test_the_unit_of_importance_does_not_count(profiles, budget, weight, shift):
    """A power of two scales without rounding, and min-max takes it out again."""
    scaled = {p.block: p.importance * 2.0**shift for p in profiles}
    found = both(profiles, budget, importance_weight=weight)
    assert found == both(changed(profiles, importances=scaled), budget, importance_weight=weight)


@given(profiles=models(), budget=BUDGETS, weight=SHARES, retained=SHARES, data=st.data())
@relaxed
def test_relabelling_blocks_relabels_the_plan(profiles, budget, weight, retained, data):
    """For distinct scores; alike ones may be told apart by position only."""
    options = {"importance_weight": weight, "retained_share": retained}
    found = both(profiles, budget, **options)
    order = data.draw(st.permutations(range(len(profiles))), label="order")
    shuffled = [profiles[i] for i in order]
    again = both(shuffled, budget, **options)
    if found is None:
        assert again is None
        return
    even, plan = found
    for pool in pools_of(profiles):
        fair = even[pool[0].shape.name]
        names = [p.shape.name for p in pool]
        scores = [] if fair is None else scores_of(pool, profiles, fair, weight)
        if all(abs(a - b) > 1e-9 * a for i, a in enumerate(scores) for b in scores[:i]):
            assert [plan[name] for name in names] == [again[1][name] for name in names]
        else:
            assert sorted(plan[name] for name in names) == sorted(again[1][name] for name in names)


@given(profiles=models(), budget=BUDGETS, weight=SHARES, data=st.data())
@relaxed
def test_fixed_ranks_stay_and_the_rest_keeps_the_sums(profiles, budget, weight, data):
    held = data.draw(st.sampled_from(profiles), label="fixed").shape
    rank = data.draw(st.integers(1, min(held.out_features, held.in_features)), label="rank")
    fixed = {held.name: rank}
    found = both(profiles, budget, importance_weight=weight, fixed=fixed)
    if found is None:
        return
    even, plan = found
    assert plan[held.name] == rank
    for pool in pools_of(profiles):
        names = [p.shape.name for p in pool if p.shape.name != held.name]
        if names and even[names[0]] is not None:
            assert sum(plan[name] for name in names) == sum(even[name] for name in names)
