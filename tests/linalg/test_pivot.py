"""Pivoted factors against the product that they are of."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError
from slimrank.linalg import Factors, decompose_outputs, other_rows, pivot_rows
from slimrank.linalg import pivot as pivot_module
from tolerances import TOLERANCE

relaxed = settings(deadline=None, max_examples=60)
EXACT = 100 * TOLERANCE["linalg", torch.float64]


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def assert_lossless(factors: Factors, bound: float = 2.0):
    """All that is promised of the pivots of any product."""
    found = pivot_rows(factors, bound)
    out, rank = factors.left.shape
    whole = factors.left.double() @ factors.right.double()
    assert found.latent.shape == factors.right.shape
    assert found.expand.shape == (out - rank, rank)
    assert {t.dtype for t in (found.latent, found.expand)} == {torch.float64}
    rows = found.pivots.tolist()
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(out))
    scale = float(factors.left.double().norm() * factors.right.double().norm())
    for dense in (found.dense(), found.factors().dense()):
        torch.testing.assert_close(dense, whole, rtol=0, atol=EXACT * max(scale, 1e-30))
    assert torch.equal(found.factors().left[found.pivots], torch.eye(rank, dtype=torch.float64))
    if found.expand.numel():
        assert float(found.expand.abs().max()) <= bound * (1 + 1e-9)
    return found


def test_a_worked_example():
    # rows 0 and 1 are the pivots: row 2 is -3 times row 0 plus 2 times row 1 unless exchanged
    left = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 2.0]])
    right = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = pivot_rows(Factors(left, right), bound=1.1)
    assert found.pivots.tolist() == [1, 2]
    # row 0 = (2 row 1 - row 2) / 3
    torch.testing.assert_close(
        found.expand, torch.tensor([[2 / 3, -1 / 3]], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(found.latent, (left[[1, 2]] @ right).double())


@given(
    out=st.integers(2, 9),
    inner=st.integers(1, 9),
    data=st.data(),
    bound=st.sampled_from([1.01, 1.5, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
@relaxed
def test_nothing_is_lost(out, inner, data, bound, seed):
    rank = data.draw(st.integers(0, out), label="rank")
    scales = 10.0 ** torch.tensor(
        data.draw(st.lists(st.integers(-8, 8), min_size=rank, max_size=rank), label="scales"),
        dtype=torch.float64,
    )
    left = normal(seed, out, rank) * scales
    assert_lossless(Factors(left, normal(seed + 1, rank, inner) / scales[:, None]), bound)


@given(
    out=st.integers(2, 9),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
    zeros=st.booleans(),
)
@relaxed
def test_columns_that_depend_on_others(out, data, seed, zeros):
    rank = data.draw(st.integers(1, out), label="rank")
    true = data.draw(st.integers(0, rank - 1), label="true rank")
    mixing = normal(seed + 1, true, rank)
    if zeros:
        mixing[:, true:] = 0
    left = normal(seed, out, true) @ mixing
    assert_lossless(Factors(left, normal(seed + 2, rank, 5)))


@given(
    entries=st.lists(st.sampled_from([-1.0, 0.0, 1.0, 1e-9]), min_size=12, max_size=12),
    rank=st.integers(1, 4),
)
@relaxed
def test_entries_that_tie_vanish_and_nearly_vanish(entries, rank):
    left = torch.tensor(entries, dtype=torch.float64)[: 12 // rank * rank].view(-1, rank)
    if len(left) >= rank:
        assert_lossless(Factors(left, normal(7, rank, 3)))


@pytest.mark.parametrize("rank", [1, 5, 30, 47, 48])
def test_a_larger_product(rank):
    solved = decompose_outputs(normal(3, 64, 48))
    for split in ("orthonormal", "balanced"):
        assert_lossless(solved.truncate(rank, split))


def test_all_rows_are_pivots_at_full_rank():
    factors = decompose_outputs(normal(4, 6, 9)).truncate(6)
    found = assert_lossless(factors)
    assert found.pivots.tolist() == list(range(6))
    assert found.expand.shape == (0, 6)


def test_no_rank_at_all():
    found = assert_lossless(Factors(torch.zeros(5, 0), torch.zeros(0, 4)))
    assert found.pivots.shape == (0,)


def test_float32_factors_are_solved_in_float64():
    factors = Factors(normal(5, 8, 3).float(), normal(6, 3, 8).float())
    assert_lossless(factors)


def test_the_volume_is_the_largest_but_for_the_bound():
    # rows without a coefficient over 1 + ε are a local maximum, so within rank^(rank / 2) of all
    left = normal(8, 8, 3)
    found = pivot_rows(Factors(left, normal(9, 3, 4)), bound=1.001)
    volumes = {
        rows: float(torch.linalg.det(left[list(rows)]).abs())
        for rows in itertools.combinations(range(8), 3)
    }
    own = volumes[tuple(found.pivots.tolist())]
    assert own * 3**1.5 * 1.01 >= max(volumes.values())
    for row, place in itertools.product(range(8), range(3)):
        swapped = found.pivots.tolist()
        swapped[place] = row
        assert float(torch.linalg.det(left[swapped]).abs()) <= 1.001001 * own


def test_rows_are_exchanged_until_the_bound_holds(monkeypatch):
    factors = Factors(normal(10, 40, 12), normal(11, 12, 5))
    exchanges = []
    exchange = pivot_module._exchange

    def counted(*arguments):
        exchanges.append(arguments)
        exchange(*arguments)

    monkeypatch.setattr(pivot_module, "_exchange", counted)
    assert_lossless(factors, bound=1.01)
    assert len(exchanges) > 3


def test_exchanges_that_do_not_end_are_an_error(monkeypatch):
    monkeypatch.setattr(pivot_module, "_exchange", lambda *_: None)
    factors = Factors(normal(10, 40, 12), normal(11, 12, 5))
    with pytest.raises(NumericalError, match=r"no 12 of 40 rows .* up to 1\.01"):
        pivot_rows(factors, bound=1.01)


def test_the_same_bits_twice_and_the_factors_untouched():
    factors = decompose_outputs(normal(11, 32, 24)).truncate(15)
    kept = factors.left.clone(), factors.right.clone()
    one, two = pivot_rows(factors), pivot_rows(factors)
    for name in ("pivots", "latent", "expand"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(factors.left, kept[0])
    assert torch.equal(factors.right, kept[1])


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rank", [16, 40])
def test_rounding_to_bfloat16_costs_no_more_than_in_the_plain_layout(decay, rank):
    plain_error = pivoted_error = 0.0
    for seed in range(4):
        basis, _ = torch.linalg.qr(normal(seed, 64, 64))
        other, _ = torch.linalg.qr(normal(seed + 100, 64, 64))
        values = decay ** torch.arange(64, dtype=torch.float64)
        factors = decompose_outputs(basis * values @ other).truncate(rank)
        whole = factors.dense()
        left, right = (t.bfloat16().double() for t in (factors.left, factors.right))
        plain_error += float((left @ right - whole).norm() / whole.norm())
        found = pivot_rows(factors)
        rounded = (t.bfloat16().double() for t in (found.latent, found.expand))
        stored = pivot_module.PivotedFactors(found.pivots, *rounded)
        pivoted_error += float((stored.dense() - whole).norm() / whole.norm())
    assert pivoted_error <= 2.5 * plain_error


def test_other_rows_are_ascending_and_need_no_values():
    assert other_rows(torch.tensor([4, 0, 2], dtype=torch.int32), 6).tolist() == [1, 3, 5]
    assert other_rows(torch.empty(3, dtype=torch.int32, device="meta"), 5).shape == (2,)


@pytest.mark.parametrize(
    ("factors", "bound", "error", "text"),
    [
        (Factors(torch.ones(3, 4), torch.ones(4, 5)), 2.0, ValueError, "rank 4 is over the 3 rows"),
        (Factors(torch.ones(3, 1), torch.ones(1, 5)), 1.0, ValueError, "bounded by more than 1"),
        (
            Factors(torch.full((3, 1), torch.nan), torch.ones(1, 5)),
            2.0,
            NumericalError,
            "the left factor holds 3",
        ),
        (
            Factors(torch.ones(3, 1), torch.full((1, 5), torch.inf)),
            2.0,
            NumericalError,
            "the right factor holds 5",
        ),
    ],
)
def test_what_is_refused(factors, bound, error, text):
    with pytest.raises(error, match=text):
        pivot_rows(factors, bound)
