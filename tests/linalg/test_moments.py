from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError
from slimrank.linalg import MomentAccumulator, Moments
from slimrank.linalg.moments import HEAVY, STRIPES
from tolerances import TOLERANCE

EXACT = TOLERANCE["moment", torch.float64]
UNIT = TOLERANCE["unit", torch.float32]

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 9)
relaxed = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def moments_of(*blocks: torch.Tensor) -> Moments:
    accumulator = MomentAccumulator(blocks[0].shape[-1])
    for block in blocks:
        accumulator.update(block)
    return accumulator.result()


def reference(tokens: torch.Tensor) -> torch.Tensor:
    """The definition, as a mean of dense outer products."""
    exact = tokens.double()
    return torch.stack([torch.outer(x, x) for x in exact]).mean(dim=0)


def reach(tokens: torch.Tensor) -> torch.Tensor:
    """What rounding errors are relative to: mean |x_i x_j|, with room for a shift of the origin.

    A shift to any point between the tokens adds no more than the largest entry of a feature.
    """
    return reference(tokens.double().abs() + tokens.double().abs().amax(dim=0))


def assert_near(found: torch.Tensor, tokens: torch.Tensor, bound: float) -> None:
    gap = (found - reference(tokens)).abs()
    assert bool((gap <= bound * reach(tokens) + 1e-300).all()), (gap / reach(tokens)).max()


def float32_bound(tokens: int) -> float:
    """Of a float32 sum in any order, and a rounding each for the origin, a shift, two factors."""
    return 1.01 * (tokens + 4) * UNIT


@given(width=WIDTHS, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_result_is_the_mean_of_outer_products(width, tokens, seed):
    inputs = normal(seed, tokens, width)
    found = moments_of(inputs)
    assert found.tokens == tokens
    assert found.original.dtype == torch.float64
    assert_near(found.original, inputs, EXACT)


@pytest.mark.parametrize("width", [1, 2, 5, 7, 8, 9, 15, 16, 17])
def test_any_width_is_filled_whatever_the_stripes(width):
    assert STRIPES == 8
    inputs = normal(width, 6, width)
    assert_near(moments_of(inputs).original, inputs, EXACT)


@given(width=WIDTHS, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
@relaxed
def test_result_is_symmetric_to_the_bit(width, seed, dtype):
    inputs = normal(seed, 11, width, dtype=dtype)
    found = moments_of(inputs, inputs[:3] * 7).original
    assert torch.equal(found, found.mT)


@given(width=WIDTHS, tokens=st.integers(2, 20), data=st.data(), seed=SEEDS)
@relaxed
def test_splits_and_order_do_not_matter(width, tokens, data, seed):
    inputs = normal(seed, tokens, width)
    cut = data.draw(st.integers(0, tokens), label="cut")
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    whole = moments_of(inputs)
    for other in (
        moments_of(inputs[:cut], inputs[cut:]),
        moments_of(*inputs.split(1)),
        moments_of(inputs[order]),
    ):
        assert other.tokens == tokens
        gap = (other.original - whole.original).abs()
        assert bool((gap <= EXACT * reach(inputs)).all())


@given(width=WIDTHS, seed=SEEDS)
@relaxed
def test_merge_is_associative_and_commutative(width, seed):
    parts = [normal(seed + i, 2 + 3 * i, width) for i in range(3)]

    def seen(part):
        accumulator = MomentAccumulator(width)
        accumulator.update(part)
        return accumulator

    left = seen(parts[0])
    left.merge(seen(parts[1]))
    left.merge(seen(parts[2]))
    tail = seen(parts[1])
    tail.merge(seen(parts[2]))
    right = seen(parts[0])
    right.merge(tail)
    backwards = seen(parts[2])
    backwards.merge(seen(parts[1]))
    backwards.merge(seen(parts[0]))
    everything = torch.cat(parts)
    for accumulator in (left, right, backwards):
        found = accumulator.result()
        assert found.tokens == len(everything)
        assert_near(found.original, everything, EXACT)


def test_merge_with_nothing_changes_nothing_and_leaves_the_other_alone():
    accumulator = MomentAccumulator(3)
    accumulator.update(normal(1, 5, 3))
    before = accumulator.result()
    empty = MomentAccumulator(3)
    accumulator.merge(empty)
    assert torch.equal(accumulator.result().original, before.original)
    empty.merge(accumulator)
    assert torch.equal(empty.result().original, before.original)
    assert empty.tokens == accumulator.tokens == 5


def test_merge_of_another_width_is_refused():
    accumulator = MomentAccumulator(3)
    accumulator.update(normal(1, 5, 3))
    before = accumulator.result().original
    with pytest.raises(ValueError, match="cannot merge 4 features into 3"):
        accumulator.merge(MomentAccumulator(4))
    assert torch.equal(accumulator.result().original, before)


@given(
    width=WIDTHS,
    tokens=st.integers(1, 40),
    seed=SEEDS,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@relaxed
def test_low_precision_inputs_stay_within_one_rounding_a_token(width, tokens, seed, dtype):
    """The bound holds for float32 sums in any order; the rounded inputs themselves are exact."""
    inputs = normal(seed, tokens, width, dtype=dtype)
    assert_near(moments_of(inputs).original, inputs, float32_bound(tokens))


def test_errors_do_not_grow_with_the_number_of_blocks():
    inputs = normal(3, 512, 6, dtype=torch.float32).abs()
    assert_near(moments_of(*inputs.split(8)).original, inputs, float32_bound(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heavy_tokens_do_not_drown_the_others(dtype):
    """In directions that the heavy token does not use, the light ones must stay exact."""
    inputs = normal(4, 32, 5).to(dtype)
    inputs[9] *= 3000.0
    found = moments_of(inputs).original
    heavy, exact = inputs[9].double(), inputs.double()
    light = torch.cat([exact[:9], exact[10:]])
    left_over = found - torch.outer(heavy, heavy) / 32
    gap = (left_over - light.mT @ light / 32).abs()
    assert bool((gap <= float32_bound(32) * reach(light)).all())
    single = (inputs.float().mT @ inputs.float() / 32).double() - torch.outer(heavy, heavy) / 32
    plain = (single - light.mT @ light / 32).abs()
    assert float(plain.max()) > 10 * float(gap.max())


@pytest.mark.parametrize("first", [1, 2, 3, 256])
def test_heavy_tokens_at_the_start_do_not_drown_the_others(first):
    """The first block may be the first token alone, and the first token an attention sink."""
    inputs = normal(4, 256, 5, dtype=torch.float32)
    inputs[0] *= 3000.0
    found = moments_of(inputs[:first], *inputs[first:].split(32)).original
    heavy, light = inputs[0].double(), inputs[1:].double()
    gap = (found - torch.outer(heavy, heavy) / 256 - light.mT @ light / 256).abs()
    alone = float32_bound(1) * torch.outer(heavy, heavy).abs() / 256  # if its block has no other
    assert bool((gap <= float32_bound(256) * reach(light) + alone).all()), gap.max()


def test_a_mean_that_is_large_against_the_spread_keeps_the_spread():
    spread = normal(8, 64, 4)
    inputs = (1000 + spread).float()
    found = moments_of(*inputs.split(16)).original
    exact = inputs.double()
    centre = exact.mean(dim=0)
    covariance = found - torch.outer(centre, centre)
    about = exact - centre
    gap = (covariance - about.mT @ about / 64).abs()
    assert float(gap.max()) < 1e-5  # float32 products of the tokens as they are miss by 1e-2


def test_what_was_summed_in_one_dtype_goes_on_in_another():
    """No more is lost than the float32 block loses by itself."""
    inputs = 1000 + normal(9, 64, 4)
    rounded = inputs[8:].float()
    found = moments_of(inputs[:8], rounded).original
    whole = torch.cat([inputs[:8], rounded.double()])
    assert_near(found, whole, float32_bound(56))


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_products_are_whole_where_a_caller_lets_torch_round_them(precision):
    tokens = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    found = []
    for setting in (precision, "highest"):
        torch.set_float32_matmul_precision(setting)
        try:
            accumulator = MomentAccumulator(128)
            accumulator.update(tokens)
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision("highest")
        found.append(accumulator.result().original)
    assert torch.equal(*found)


def test_a_token_is_heavy_by_its_squared_norm_over_the_median():
    """On either side of the threshold the sum is right; mostly-zero blocks have a median of 0."""
    for times in (0.99 * HEAVY**0.5, 1.01 * HEAVY**0.5, 1e6):
        inputs = torch.ones(9, 3)
        inputs[4] *= times
        assert_near(moments_of(inputs).original, inputs, float32_bound(9))
    padded = torch.zeros(9, 3)
    padded[2:4] = normal(1, 2, 3, dtype=torch.float32)
    found = moments_of(padded)
    assert found.tokens == 9
    assert_near(found.original, padded, EXACT)


def test_no_tokens_give_zero():
    accumulator = MomentAccumulator(3)
    accumulator.update(torch.zeros(0, 3))
    accumulator.update(torch.zeros(2, 0, 3))
    found = accumulator.result()
    assert found.tokens == 0
    assert torch.equal(found.original, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused_and_the_sums_stay(value, dtype):
    accumulator = MomentAccumulator(3)
    accumulator.update(normal(1, 5, 3))
    before = accumulator.result().original
    bad = normal(2, 4, 3, dtype=dtype)
    bad[1, 2] = value
    with pytest.raises(NumericalError, match="1 of 4 activations"):
        accumulator.update(bad)
    assert accumulator.tokens == 5
    assert torch.equal(accumulator.result().original, before)
    accumulator.update(normal(3, 2, 3))
    assert accumulator.tokens == 7


def test_a_float32_value_too_large_to_square_is_refused():
    accumulator = MomentAccumulator(2)
    tokens = torch.ones(64, 2)  # fewer would be taken in float64, where it can be squared
    tokens[0, 1] = 1e20
    with pytest.raises(NumericalError, match="too large to square"):
        accumulator.update(tokens)
    assert accumulator.tokens == 0
    assert float(accumulator.result().original.abs().max()) == 0.0


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3)])
def test_all_leading_axes_are_tokens(batch):
    inputs = normal(5, *batch, 4)
    found = moments_of(inputs)
    assert found.tokens == inputs.numel() // 4
    assert_near(found.original, inputs.reshape(-1, 4), EXACT)


def test_inputs_are_left_alone_and_may_be_views_or_need_gradients():
    inputs = normal(6, 4, 5, 3, dtype=torch.float32)
    kept = inputs.clone()
    inputs[0, 0] *= 1000
    kept[0, 0] *= 1000
    strided = inputs.transpose(0, 1)
    found = moments_of(strided.requires_grad_())
    assert torch.equal(inputs.detach(), kept)
    assert not found.original.requires_grad
    assert_near(found.original, kept.reshape(-1, 3), float32_bound(20))


def test_a_result_is_a_snapshot():
    accumulator = MomentAccumulator(2)
    accumulator.update(torch.ones(1, 2))
    first = accumulator.result()
    accumulator.update(3 * torch.ones(1, 2))
    assert first.original.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert accumulator.result().original.tolist() == [[5.0, 5.0], [5.0, 5.0]]


# of two streams, and with a ridge


def streams_of(seed: int, tokens: int, width: int) -> Moments:
    x, z = normal(seed, tokens, width), 2 * normal(seed + 1, tokens, width)
    return Moments(
        original=reference(x), tokens=tokens, shifted=reference(z), drift=(x - z).mT @ z / tokens
    )


def test_what_is_taken_is_the_result_to_the_bit():
    tokens = torch.randn(100, 9, generator=torch.Generator().manual_seed(0)) + 3
    accumulator = MomentAccumulator(9)
    accumulator.update(tokens)
    expected, sums = accumulator.result(), accumulator._second.data_ptr()
    taken = accumulator.taken()
    assert torch.equal(taken.original, expected.original)
    assert taken.tokens == expected.tokens == accumulator.tokens
    assert taken.original.data_ptr() == sums


def test_what_arrives_is_shifted_if_anything_has():
    moments = streams_of(1, 9, 3)
    assert moments.arriving is moments.shifted
    assert replace(moments, shifted=None, drift=None).arriving is moments.original
    assert replace(moments, original=None).arriving is moments.shifted
    assert Moments(None, 4).arriving is None


@given(width=WIDTHS, tokens=st.integers(1, 20), seed=SEEDS, relative=st.floats(1e-6, 10))
@relaxed
def test_a_ridge_is_the_same_rows_more_in_both_streams(width, tokens, seed, relative):
    """Rows ``√λ I`` under both: no drift in them, so the drift stays; the mean is of the tokens."""
    x, z = normal(seed, tokens, width), 2 * normal(seed + 1, tokens, width)
    found = streams_of(seed, tokens, width).ridged(relative)
    size = relative * float((z.mT @ z / tokens).diagonal().mean())
    rows = (size * tokens) ** 0.5 * torch.eye(width, dtype=torch.float64)
    longer_x, longer_z = torch.cat([x, rows]), torch.cat([z, rows])
    for moment, stream in ((found.original, longer_x), (found.shifted, longer_z)):
        expected = stream.mT @ stream / tokens
        torch.testing.assert_close(moment, expected, rtol=0, atol=1e-12 * float(expected.norm()))
    drift = (longer_x - longer_z).mT @ longer_z / tokens
    torch.testing.assert_close(found.drift, drift, rtol=0, atol=1e-12 * float(drift.norm()))
    assert found.ridge == pytest.approx(size, rel=1e-12)
    assert found.tokens == tokens


def test_a_ridge_changes_nothing_that_it_was_given():
    moments = streams_of(2, 9, 3)
    kept = [tensor.clone() for tensor in (moments.original, moments.shifted, moments.drift)]
    found = replace(moments, output_energy=7.0).ridged(0.5)
    assert found.output_energy == 7.0
    assert found.drift is moments.drift
    for tensor, before in zip(
        (moments.original, moments.shifted, moments.drift), kept, strict=True
    ):
        assert torch.equal(tensor, before)


def test_ridges_add_up():
    twice = Moments(torch.diag(torch.tensor([3.0, 1.0])), 5).ridged(0.5).ridged(1.0)
    assert twice.ridge == 4.0  # half of a mean of 2, then all of a mean of 3
    assert twice.original.tolist() == [[7.0, 0.0], [0.0, 5.0]]


def test_a_ridge_settles_what_too_few_tokens_leave_open():
    moments = streams_of(3, 2, 5)
    assert moments.known_tokens == 2
    assert moments.ridged(0.01).known_tokens is None
    assert float(torch.linalg.eigvalsh(moments.ridged(0.01).shifted).min()) > 0


def test_no_ridge_and_nothing_to_add_it_to_are_left_as_they_are():
    moments = streams_of(4, 9, 3)
    assert moments.ridged(0.0) is moments
    nothing = Moments(None, 4)
    assert nothing.ridged(0.1) is nothing
    one = replace(moments, original=None).ridged(0.1)
    assert one.original is None
    assert torch.equal(one.shifted, moments.ridged(0.1).shifted)
    silent = Moments(torch.zeros(3, 3, dtype=torch.float64), 4).ridged(0.1)
    assert silent.known_tokens == 4  # a share of nothing settles nothing
