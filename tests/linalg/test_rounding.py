"""Rounding to eight bits: its bound, its worked example, and what it says it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError
from slimrank.linalg import (
    Factors,
    even_columns,
    pivot_rows,
    principal_components,
    remap,
    round_rows,
    rounding_loss,
)
from tolerances import TOLERANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_hand_worked_example():
    # row 1: 2.54 / 127 = 0.02; -1.0 / 0.02 = -50; 0.011 / 0.02 = 0.55, to 1; 0.009 to 0
    rounded = round_rows(torch.tensor([[2.54, -1.0, 0.011, 0.009]], dtype=torch.float64))
    assert rounded.codes.tolist() == [[127, -50, 1, 0]]
    assert rounded.scale.tolist() == pytest.approx([0.02], rel=1e-15)
    assert rounded.matrix()[0].tolist() == pytest.approx([2.54, -1.0, 0.02, 0.0], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    columns=st.integers(1, 9),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 1000),
)
def test_no_entry_is_off_by_more_than_half_a_step(rows, columns, exponent, dtype, seed):
    matrix = random(rows, columns, seed=seed) * 2.0**exponent
    rounded = round_rows(matrix, dtype)
    steps = rounded.scale.double()[:, None]
    assert rounded.scale.dtype == dtype
    assert (rounded.codes.int().abs() <= 127).all()
    off = (matrix - rounded.codes.double() * steps).abs()
    assert (off <= steps / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_the_next_number_of_its_dtype(dtype):
    rounded = round_rows(random(50, 8), dtype)
    exact = random(50, 8).abs().amax(1) / 127
    assert (rounded.scale.double() >= exact).all()
    assert (rounded.scale.double() <= exact * (1 + 2 * torch.finfo(dtype).eps)).all()


def test_zero_rows_stay_zero():
    rounded = round_rows(torch.tensor([[0.0, 0.0], [1e-30, 0.0]]))
    assert rounded.scale[0] == 0
    assert rounded.matrix()[0].tolist() == [0.0, 0.0]
    assert rounded.codes[1, 0] == 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(NumericalError, match="not finite"):
        round_rows(torch.tensor([[1.0, bad]]))


def test_a_scale_beyond_its_dtype_is_refused():
    with pytest.raises(NumericalError, match=r"torch\.float16"):
        round_rows(torch.tensor([[1e9, 1.0]]), torch.float16)


def test_even_columns_keep_the_product_and_lower_the_error():
    left, right = random(40, 6) * torch.logspace(0, -4, 6, dtype=torch.float64), random(6, 30)
    factors = Factors(left, right * torch.logspace(-4, 0, 6, dtype=torch.float64)[:, None])
    even = even_columns(factors)
    gap = (even.dense() - factors.dense()).norm() / factors.dense().norm()
    assert gap < TOLERANCE["linalg", torch.float64]
    assert torch.allclose(even.left.norm(dim=0), torch.ones(6, dtype=torch.float64))

    def loss(parts):
        rounded = Factors(round_rows(parts.left).matrix(), round_rows(parts.right).matrix())
        return rounding_loss(parts, rounded)

    assert loss(even) < loss(factors) / 10


def test_the_loss_is_that_of_the_dense_product():
    exact = Factors(random(9, 4), random(4, 7, seed=1))
    rounded = Factors(round_rows(exact.left).matrix(), round_rows(exact.right).matrix())
    dense = exact.dense()
    expected = ((rounded.dense() - dense).norm() / dense.norm()) ** 2
    assert 0 < expected < 1e-3
    assert rounding_loss(exact, rounded) == pytest.approx(float(expected), rel=1e-9)
    assert rounding_loss(exact, exact) == 0.0
    nothing = Factors(torch.zeros(3, 1), torch.zeros(1, 2))
    assert rounding_loss(nothing, nothing) == 0.0


def test_principal_components_keep_the_product_and_lower_the_error():
    spread = torch.logspace(0, -2, 24, dtype=torch.float64)[:, None]
    pivoted = pivot_rows(Factors(random(96, 24), spread * random(24, 40, seed=1)))
    factors = pivoted.factors()
    found = principal_components(factors)
    unit = TOLERANCE["linalg", torch.float64]
    assert (found.dense() - factors.dense()).norm() < unit * factors.dense().norm()
    assert (found.left.mT @ found.left - torch.eye(24)).norm() < 24 * unit
    gram = found.right @ found.right.mT
    assert (gram - gram.diagonal().diag()).norm() < unit * gram.norm()
    assert (gram.diagonal().diff() <= 0).all()

    def loss(parts):
        return rounding_loss(factors, remap(parts).factors())

    assert loss(found) < loss(factors) / 3
