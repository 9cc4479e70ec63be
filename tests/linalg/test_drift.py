import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError
from slimrank.linalg import DriftAccumulator, MomentAccumulator
from slimrank.linalg.moments import SMALL_BLOCK
from tolerances import TOLERANCE

EXACT = TOLERANCE["moment", torch.float64]
UNIT = TOLERANCE["unit", torch.float32]

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 9)
relaxed = settings(deadline=None, max_examples=25)

Pair = tuple[torch.Tensor, torch.Tensor]


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def pair(seed: int, *shape: int, dtype: torch.dtype = torch.float64, shift: float = 0.1) -> Pair:
    z = normal(seed, *shape)
    return (z + shift * normal(seed + 1, *shape)).to(dtype), z.to(dtype)


def seen(*blocks: Pair) -> DriftAccumulator:
    accumulator = DriftAccumulator(blocks[0][0].shape[-1])
    for x, z in blocks:
        accumulator.update(x, z)
    return accumulator


def split(streams: Pair, size: int) -> list[Pair]:
    return list(zip(*(stream.split(size) for stream in streams), strict=True))


def reference(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The definition, as a mean of dense outer products."""
    rows = zip(x.double(), z.double(), strict=True)
    return torch.stack([torch.outer(a - b, b) for a, b in rows]).mean(dim=0)


def reach(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What rounding errors are relative to: mean |d_i z_j|, with room for a shift of z's origin."""
    size = z.double().abs() + z.double().abs().amax(dim=0)
    return (x.double() - z.double()).abs().mT @ size / len(z)


def assert_near(found: torch.Tensor | None, x: torch.Tensor, z: torch.Tensor, bound: float) -> None:
    assert found is not None
    gap = (found - reference(x, z)).abs()
    assert bool((gap <= bound * reach(x, z) + 1e-300).all()), (gap / reach(x, z)).max()


def float32_bound(tokens: int) -> float:
    """Of a float32 sum in any order, and a rounding each for the shift, the origin, the product."""
    return 1.01 * (tokens + 4) * UNIT


def test_it_is_the_cross_moment_less_the_shifted_one_by_hand():
    accumulator = DriftAccumulator(2)
    accumulator.update(
        torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    )
    assert accumulator.tokens == 2
    found = accumulator.result()
    assert found.dtype == torch.float64
    # (1, -3) (1, 3)ᵀ and (0, 1) (1, 0)ᵀ, over two
    assert found.tolist() == [[0.5, 1.5], [-1.0, -4.5]]


@given(width=WIDTHS, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_result_is_the_mean_of_outer_products(width, tokens, seed):
    x, z = pair(seed, tokens, width)
    accumulator = seen((x, z))
    assert accumulator.tokens == tokens
    assert_near(accumulator.result(), x, z, EXACT)
    both = x.mT @ z / tokens  # the paper's cross moment
    torch.testing.assert_close(accumulator.result() + z.mT @ z / tokens, both, rtol=0, atol=1e-12)


@given(
    width=WIDTHS,
    tokens=st.sampled_from([1, 5, SMALL_BLOCK - 1, SMALL_BLOCK, 100]),
    seed=SEEDS,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@relaxed
def test_low_precision_inputs_stay_within_one_rounding_a_token(width, tokens, seed, dtype):
    """Small blocks are float64 throughout; the rounded inputs themselves are exact."""
    x, z = pair(seed, tokens, width, dtype=dtype)
    bound = EXACT if tokens < SMALL_BLOCK else float32_bound(tokens)
    if not torch.equal(x, z):
        assert_near(seen((x, z)).result(), x, z, bound)


@given(width=WIDTHS, tokens=st.integers(2, 150), data=st.data(), seed=SEEDS)
@relaxed
def test_splits_and_order_do_not_matter(width, tokens, data, seed):
    x, z = pair(seed, tokens, width)
    cut = data.draw(st.integers(0, tokens), label="cut")
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    for other in (
        seen((x, z)),
        seen((x[:cut], z[:cut]), (x[cut:], z[cut:])),
        seen(*split((x, z), 7)),
        seen((x[order], z[order])),
    ):
        assert other.tokens == tokens
        assert_near(other.result(), x, z, EXACT)


@given(
    width=WIDTHS, sizes=st.lists(st.sampled_from([2, 5, 70]), min_size=3, max_size=3), seed=SEEDS
)
@relaxed
def test_merge_is_associative_and_commutative(width, sizes, seed):
    """Parts of 70 tokens choose a centre, smaller ones have none: each pairing is met."""
    parts = []
    for part, size in enumerate(sizes):
        x, z = pair(seed + 5 * part, size, width)
        parts.append((x + 10 * part, z + 10 * part))
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
    x, z = (torch.cat(stream) for stream in zip(*parts, strict=True))
    for accumulator in (left, right, backwards):
        assert accumulator.tokens == sum(sizes)
        assert_near(accumulator.result(), x, z, EXACT)


def test_merge_with_nothing_changes_nothing_and_leaves_the_other_alone():
    accumulator = seen(pair(1, 70, 3))
    before = accumulator.result()
    empty = DriftAccumulator(3)
    accumulator.merge(empty)
    assert torch.equal(accumulator.result(), before)
    assert empty.result() is None
    empty.merge(accumulator)
    assert torch.equal(empty.result(), before)
    assert empty.tokens == accumulator.tokens == 70
    empty.merge(accumulator)
    assert torch.equal(accumulator.result(), before)


def test_merge_of_another_width_is_refused():
    accumulator = seen(pair(1, 5, 3))
    before = accumulator.result()
    with pytest.raises(ValueError, match="cannot merge 4 features into 3"):
        accumulator.merge(DriftAccumulator(4))
    assert torch.equal(accumulator.result(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 200])
def test_equal_streams_have_no_drift_at_all(dtype, tokens):
    z = (1000 * normal(1, tokens, 4)).to(dtype)
    accumulator = seen((z, z.clone()), (z[:0], z[:0]))
    assert accumulator.tokens == tokens
    assert accumulator.result() is None
    other = seen((z, z))
    other.merge(accumulator)
    assert other.tokens == 2 * tokens
    assert other.result() is None


def test_blocks_without_drift_count_as_tokens():
    x, z = pair(1, 70, 3)
    same = 5 + normal(3, 90, 3)
    for accumulator in (seen((same, same), (x, z)), seen((x, z), (same, same))):
        assert accumulator.tokens == 160
        assert_near(accumulator.result(), torch.cat([x, same]), torch.cat([z, same]), EXACT)


def test_a_drift_of_a_millionth_is_told_to_its_own_precision():
    """Cross moment less shifted moment, each summed in float32, would lose most of it."""
    z = normal(1, 256, 5).float()
    x = z + 1e-6 * normal(2, 256, 5).float()
    assert_near(seen(*split((x, z), 64)).result(), x, z, float32_bound(64))
    apart = (x.mT @ z - z.mT @ z).double() / 256
    missed = (apart - reference(x, z)).abs() / reach(x, z)
    assert float(missed.max()) > 100 * float32_bound(64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whose", ["both streams", "the original"])
def test_heavy_tokens_do_not_drown_the_others(dtype, whose):
    """What the light ones add is still there once the heavy one is taken off."""
    x, z = pair(4, 128, 5, dtype=dtype)
    x[9] *= 3000.0
    if whose == "both streams":
        z[9] *= 3000.0
    found = seen((x, z)).result()
    exact = x.double() - z.double(), z.double()
    heavy = torch.outer(exact[0][9], exact[1][9]) / 128
    light = torch.cat([x[:9], x[10:]]), torch.cat([z[:9], z[10:]])
    expected = reference(*light) * 127 / 128
    # the heavy one is rounded once more where its part is put back about the centre
    allowed = float32_bound(128) * reach(*light) + EXACT * reach(x, z)
    gap = (found - heavy - expected).abs()
    assert bool((gap <= allowed).all()), (gap / allowed).max()
    drift = x.float() - z.float()
    plain = ((drift.mT @ z.float()).double() / 128 - heavy - expected).abs()
    assert float(plain.max()) > 10 * float(gap.max())


@pytest.mark.parametrize("first", [1, 3, 256])
def test_a_heavy_token_may_be_the_first(first):
    """A first block of one attention sink is small, so it is exact, and it sets no centre."""
    x, z = (stream.float() for stream in pair(5, 256, 4))
    x[0] *= 3000.0
    z[0] *= 3000.0
    blocks = [(x[:first], z[:first]), *split((x[first:], z[first:]), 64)][
        : None if first < 256 else 1
    ]
    found = seen(*blocks).result()
    exact = x.double(), z.double()
    heavy = torch.outer(exact[0][0] - exact[1][0], exact[1][0]) / 256
    light = x[1:], z[1:]
    allowed = float32_bound(256) * reach(*light) + EXACT * reach(x, z)
    assert bool(((found - heavy - reference(*light) * 255 / 256).abs() <= allowed).all())


def test_a_mean_that_is_large_against_the_spread_keeps_the_spread():
    """The drift is tied to the spread: about the centre it must be as exact as without a mean."""
    spread = normal(8, 256, 4)
    z = (1000 + spread).float()
    x = z + (0.1 * spread).float()
    found = seen(*split((x, z), 64)).result()
    drift, exact = x.double() - z.double(), z.double()
    centre = exact.mean(dim=0)
    about = found - torch.outer(drift.mean(dim=0), centre)
    gap = (about - drift.mT @ (exact - centre) / 256).abs()
    plain = ((x - z).mT @ z).double() / 256 - torch.outer(drift.mean(dim=0), centre)
    missed = (plain - drift.mT @ (exact - centre) / 256).abs()
    assert float(gap.max()) < 2e-6
    assert float(missed.max()) > 5 * float(gap.max())


def test_what_was_summed_in_one_dtype_goes_on_in_another():
    x, z = pair(9, 200, 4)
    rounded = x[20:].float(), z[20:].float()
    found = seen((x[:20], z[:20]), rounded).result()
    whole = (torch.cat([a, b.double()]) for a, b in zip((x[:20], z[:20]), rounded, strict=True))
    assert_near(found, *whole, float32_bound(180))


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3)])
def test_all_leading_axes_are_tokens(batch):
    x, z = pair(5, *batch, 4)
    accumulator = seen((x, z))
    assert accumulator.tokens == x.numel() // 4
    assert_near(accumulator.result(), x.reshape(-1, 4), z.reshape(-1, 4), EXACT)


def test_no_tokens_give_none():
    accumulator = seen((torch.zeros(0, 3), torch.zeros(0, 3)))
    assert accumulator.tokens == 0
    assert accumulator.result() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("tokens", [4, 70])
def test_what_is_not_finite_is_refused_and_the_sums_stay(value, dtype, whose, tokens):
    accumulator = seen(pair(1, 5, 3))
    before = accumulator.result()
    bad = pair(2, tokens, 3, dtype=dtype)
    bad[whose][1, 2] = value
    with pytest.raises(NumericalError, match=f"1 of {tokens} activations"):
        accumulator.update(*bad)
    assert accumulator.tokens == 5
    assert torch.equal(accumulator.result(), before)
    accumulator.update(*pair(3, 2, 3))
    assert accumulator.tokens == 7


def test_the_same_bad_value_in_both_streams_is_refused():
    bad = torch.full((2, 3), float("inf"))
    with pytest.raises(NumericalError, match="2 of 2 activations"):
        DriftAccumulator(3).update(bad, bad)


def test_inputs_are_left_alone_and_may_be_views_or_need_gradients():
    x, z = pair(6, 4, 25, 3, dtype=torch.float32)
    x[0, 0] *= 1000
    kept = x.clone(), z.clone()
    views = [stream.transpose(0, 1).requires_grad_() for stream in (x, z)]
    found = seen((views[0], views[1])).result()
    assert torch.equal(x.detach(), kept[0])
    assert torch.equal(z.detach(), kept[1])
    assert not found.requires_grad
    assert_near(found, *(stream.reshape(-1, 3) for stream in kept), float32_bound(100))


def test_a_result_is_a_snapshot():
    accumulator = seen((torch.tensor([[2.0]]), torch.tensor([[1.0]])))
    first = accumulator.result()
    accumulator.update(torch.tensor([[4.0]]), torch.tensor([[1.0]]))
    assert first.tolist() == [[1.0]]
    assert accumulator.result().tolist() == [[2.0]]


@given(
    sizes=st.lists(st.sampled_from([1, 20, SMALL_BLOCK, 150]), min_size=1, max_size=4),
    heavy=st.booleans(),
    equal_first=st.booleans(),
    seed=SEEDS,
)
@relaxed
def test_what_the_moments_have_centred_serves_as_well(sizes, heavy, equal_first, seed):
    x, z = pair(seed, sum(sizes), 5, dtype=torch.float32)
    x, z = x + 30, z + 30
    if heavy:
        x[0], z[-1] = 1e4 * x[0], 1e4 * z[-1]
    if equal_first:
        x[: sizes[0]] = z[: sizes[0]]
    moments, drift = MomentAccumulator(5), DriftAccumulator(5)
    for one, other in zip(x.split(sizes), z.split(sizes), strict=True):
        drift.update(one, other, moments.update(other))
    assert drift.tokens == len(x)
    if torch.equal(x, z):
        assert drift.result() is None
    else:
        assert_near(drift.result(), x, z, float32_bound(len(x)))
