import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.errors import NotPositiveDefiniteError, NumericalError, NumericalWarning
from slimrank.linalg import cholesky_with_jitter, symmetric_root, symmetrize
from slimrank.linalg.psd import JITTER_START, JITTER_STEPS, require_finite
from tolerances import TOLERANCE

LINALG = TOLERANCE["linalg", torch.float64]

SEEDS = st.integers(0, 2**32 - 1)
relaxed = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def with_spectrum(seed: int, *eigenvalues: float) -> torch.Tensor:
    turn = torch.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues))).Q
    return symmetrize(turn * torch.tensor(eigenvalues, dtype=torch.float64) @ turn.mT)


@given(side=st.integers(1, 9), seed=SEEDS)
@relaxed
def test_no_jitter_where_none_is_needed(side, seed):
    mixing = normal(seed, side, side)
    matrix = mixing @ mixing.mT + torch.eye(side, dtype=torch.float64)
    kept = matrix.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root, jitter = cholesky_with_jitter(matrix)
    assert jitter == 0.0
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.mT, matrix, rtol=0, atol=LINALG * float(matrix.norm()))
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize(
    ("lowest", "step"), [(-3e-14, 1), (-3e-12, 3), (-3e-10, 5), (-3e-8, 7), (-5e-7, 8)]
)
def test_the_jitter_is_the_first_of_the_ladder_that_works(lowest, step):
    """Diagonal 1, 1, 1 and a little below 0: the mean diagonal is 3/4, so the steps are known."""
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, lowest], dtype=torch.float64))
    scale = float(matrix.diagonal().mean())
    ladder = [scale * JITTER_START * 10**k for k in range(JITTER_STEPS)]
    expected = next(jitter for jitter in ladder if jitter + lowest > 0)
    assert expected == pytest.approx(scale * JITTER_START * 10**step)
    amount = f"{expected / scale:.0e}"
    with pytest.warns(NumericalWarning, match=f"size 4 is singular; added {amount} of its mean"):
        root, jitter = cholesky_with_jitter(matrix)
    assert jitter == pytest.approx(expected, rel=1e-12)
    held = matrix + jitter * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(root @ root.mT, held, rtol=0, atol=1e-15)


def test_the_jitter_follows_the_scale_of_the_matrix():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    found = []
    for scale in (1e-8, 1.0, 1e8):
        with pytest.warns(NumericalWarning):
            found.append(cholesky_with_jitter(scale * matrix)[1] / scale)
    assert found == pytest.approx([found[1]] * 3, rel=1e-12)


@pytest.mark.parametrize(
    "eigenvalues", [(1.0, 1.0, -1e-3), (1.0, -1.0), (-1.0, -2.0), (1.0, 0.5, -0.5)]
)
def test_a_clearly_indefinite_matrix_has_no_root(eigenvalues):
    with pytest.raises(NotPositiveDefiniteError, match="swift-svd"):
        cholesky_with_jitter(with_spectrum(1, *eigenvalues))


def test_the_last_jitter_is_a_millionth_of_the_mean_diagonal():
    last = JITTER_START * 10 ** (JITTER_STEPS - 1)
    assert last == pytest.approx(1e-6)
    matrix = torch.diag(torch.tensor([1.0, 1.0, -2e-6], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError):
        cholesky_with_jitter(matrix)


@pytest.mark.parametrize("take_root", [cholesky_with_jitter, symmetric_root])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_roots_refuse_what_is_not_finite(take_root, value):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 2] = matrix[2, 1] = value
    with pytest.raises(NumericalError, match="the second moment holds 2 entries"):
        take_root(matrix)


def test_not_positive_definite_is_a_numerical_error():
    assert issubclass(NotPositiveDefiniteError, NumericalError)


def test_require_finite_says_what_and_how_many():
    require_finite(torch.zeros(2, 2), "it")
    with pytest.raises(NumericalError, match="the thing holds 3 entries"):
        require_finite(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]), "the thing")


@given(side=st.integers(1, 9), data=st.data(), seed=SEEDS)
@relaxed
def test_symmetric_root_of_any_rank(side, data, seed):
    rank = data.draw(st.integers(0, side), label="rank")
    thin = normal(seed, side, rank)
    matrix = symmetrize(thin @ thin.mT)
    root = symmetric_root(matrix)
    assert root.shape == (side, side)
    torch.testing.assert_close(
        root @ root.mT, matrix, rtol=0, atol=LINALG * float(matrix.norm()) + 1e-300
    )


def test_symmetric_root_takes_negative_rounding_as_zero():
    matrix = torch.diag(torch.tensor([4.0, -1e-17], dtype=torch.float64))
    root = symmetric_root(matrix)
    assert bool(torch.isfinite(root).all())
    assert (root @ root.mT).tolist() == [[4.0, 0.0], [0.0, 0.0]]


@given(side=st.integers(1, 9), seed=SEEDS)
@relaxed
def test_symmetrize_is_symmetric_and_idempotent(side, seed):
    matrix = normal(seed, side, side)
    found = symmetrize(matrix)
    assert torch.equal(found, found.mT)
    assert torch.equal(symmetrize(found), found)
    torch.testing.assert_close(found + (matrix - matrix.mT) / 2, matrix)
