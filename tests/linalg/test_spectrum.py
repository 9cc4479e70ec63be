import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.linalg import (
    effective_rank,
    normalized_effective_rank,
    rank_for_energy,
    tail_energy,
)

relaxed = settings(deadline=None, max_examples=25)
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 1.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([2.0, 2.0], 2.0),
        ([3.0, 3.0, 3.0, 3.0, 0.0], 4.0),
        # p = 1/2, 1/4, 1/4: the entropy is 1.5 ln 2, of the values and not of their squares
        ([2.0, 1.0, 1.0], 2.0**1.5),
        ([0.0, 0.0], 0.0),
    ],
)
def test_effective_rank_of_known_spectra(values, expected):
    assert effective_rank(torch.tensor(values)) == pytest.approx(expected, rel=1e-12)


@given(values=SPECTRA, zeros=st.integers(0, 3), scale=st.floats(1e-3, 1e3))
@relaxed
def test_effective_rank_is_bounded_and_has_no_unit(values, zeros, scale):
    padded = torch.cat([values, values.new_zeros(zeros)])
    found = effective_rank(padded)
    assert 1 - 1e-9 <= found <= len(values) * (1 + 1e-12)
    assert effective_rank(scale * padded) == pytest.approx(found, rel=1e-9)


def test_normalized_effective_rank_counts_the_shorter_side_only():
    values = torch.tensor([2.0, 2.0, 2.0, 2.0])
    assert normalized_effective_rank(values, in_features=4, out_features=9) == pytest.approx(1.0)
    assert normalized_effective_rank(values, in_features=9, out_features=2) == pytest.approx(1.0)
    some = torch.tensor([2.0, 2.0, 0.0, 0.0])
    assert normalized_effective_rank(some, in_features=4, out_features=4) == pytest.approx(0.5)


@given(values=SPECTRA)
@relaxed
def test_tail_energy_is_what_each_rank_leaves_out(values):
    tail = tail_energy(values)
    assert tail.shape == (len(values) + 1,)
    assert tail.dtype == torch.float64
    for rank in range(len(values) + 1):
        expected = math.fsum(float(v) ** 2 for v in values[rank:])
        assert float(tail[rank]) == pytest.approx(expected, rel=1e-13)
    assert bool((tail.diff() <= 0).all())
    assert float(tail[-1]) == 0.0


def test_tail_energy_keeps_small_tails_beside_large_heads():
    """Summed from the small end: subtracting from the total would give 0 here."""
    tail = tail_energy(torch.tensor([1e9, 1.0, 0.5], dtype=torch.float64))
    assert tail.tolist() == [1e18 + 1.25, 1.25, 0.25, 0.0]


def test_tail_energy_of_float32_is_summed_in_float64():
    tail = tail_energy(torch.tensor([1e25, 1.0]))
    assert tail[0].item() == pytest.approx(1e50, rel=1e-6)


@given(values=SPECTRA, share=st.floats(0, 1))
@relaxed
def test_rank_for_energy_is_the_smallest_that_keeps_enough(values, share):
    rank = rank_for_energy(values, share)
    squares = [float(v) ** 2 for v in values]
    total = math.fsum(squares)
    slack = 1e-12 * total
    assert 0 <= rank <= len(values)
    assert math.fsum(squares[:rank]) >= share * total - slack
    if rank > 0:
        assert math.fsum(squares[: rank - 1]) <= share * total + slack


def test_rank_for_energy_at_the_ends():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert rank_for_energy(values, 0.0) == 0
    assert rank_for_energy(values, 1.0) == 3
    assert rank_for_energy(torch.ones(4), 0.75) == 3
    assert rank_for_energy(torch.zeros(4), 0.5) == 0
