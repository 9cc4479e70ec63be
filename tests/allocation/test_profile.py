import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import LinearProfile, LinearShape
from slimrank.errors import NumericalError
from slimrank.linalg import decompose_outputs
from tolerances import TOLERANCE

relaxed = settings(deadline=None, max_examples=25)


def profile(values, sides=None, tokens=1, importance=0.5):
    out, inner = sides or (len(values), len(values))
    spectrum = torch.tensor(values, dtype=torch.float64)
    return LinearProfile(LinearShape("3.q", out, inner), "q", 3, spectrum, tokens, importance)


def test_residual_by_hand():
    """Squares left out: 9 + 16, 9, 0; times four tokens, under the root."""
    found = profile([4.0, 3.0], sides=(2, 7), tokens=4)
    assert [found.residual(rank) for rank in range(3)] == [10.0, 6.0, 0.0]


def test_no_tokens_leave_nothing():
    assert profile([4.0, 3.0], tokens=0).residual(0) == 0.0


@given(seed=st.integers(0, 10_000), out=st.integers(2, 6), inner=st.integers(2, 6))
@relaxed
def test_residual_is_the_norm_that_truncation_leaves_of_the_stacked_outputs(seed, out, inner):
    """Equation 4, against the outputs themselves: ‖X W − X W_k‖ over all tokens."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    inputs = torch.randn(17, inner, generator=generator, dtype=torch.float64)
    best = decompose_outputs(weight, inputs.mT @ inputs / 17, tokens=17)
    found = LinearProfile(LinearShape("0.q", out, inner), "q", 0, best.singular_values, 17, 0.0)
    outputs = inputs @ weight.mT
    bound = math.sqrt(TOLERANCE["loss", torch.float64]) * float(outputs.norm())
    for rank in range(min(out, inner) + 1):
        left = (outputs - inputs @ best.truncate(rank).dense().mT).norm()
        assert found.residual(rank) == pytest.approx(float(left), rel=1e-9, abs=bound)


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_the_spectrum_is_refused(rank):
    with pytest.raises(ValueError, match=rf"3\.q: rank {rank} is not within 0 and 2"):
        profile([4.0, 3.0]).residual(rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(NumericalError, match=r"3\.q: its spectrum is not finite"):
        profile([bad, 3.0])
    with pytest.raises(NumericalError, match=r"3\.q: the importance of block 3 is not finite"):
        profile([4.0, 3.0], importance=bad)


def test_a_spectrum_in_eigh_order_is_refused():
    with pytest.raises(ValueError, match=r"3\.q: singular values must descend"):
        profile([3.0, 4.0])


@pytest.mark.parametrize("count", [1, 3])
def test_a_spectrum_that_is_not_of_the_shorter_side_is_refused(count):
    with pytest.raises(ValueError, match=f"a spectrum of 2 values is needed, not of {count}"):
        profile([1.0] * count, sides=(9, 2))


def test_equal_and_zero_singular_values_are_fine():
    assert profile([2.0, 2.0, 0.0]).residual(1) == 2.0
