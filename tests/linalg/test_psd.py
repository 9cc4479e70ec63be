import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimrank.errors import NotPositiveDefiniteError, NumericalError, NumericalWarning
from slimrank.linalg import cholesky_with_jitter, divide, symmetric_root, symmetrize
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


# divide


def scaled_to(moment: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The moment of features that are that many times larger."""
    return moment * sizes[:, None] * sizes


def moment_of(seed: int, tokens: int, features: int) -> torch.Tensor:
    inputs = normal(seed, tokens, features)
    return symmetrize(inputs.mT @ inputs / tokens)


def correlation(moment: torch.Tensor) -> torch.Tensor:
    return scaled_to(moment, moment.diagonal().rsqrt())


@given(rows=st.integers(1, 9), side=st.integers(1, 9), seed=SEEDS)
@relaxed
def test_divide_solves_where_the_moment_is_well_conditioned(rows, side, seed):
    matrix = normal(seed, rows, side)
    moment = moment_of(seed + 1, 3 * side + 5, side) + torch.eye(side, dtype=torch.float64)
    kept = matrix.clone(), moment.clone()
    expected = torch.linalg.solve(moment, matrix.mT).mT
    for tokens in (None, side, 100):
        found = divide(matrix, moment, tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=100 * LINALG)
    assert torch.equal(matrix, kept[0])
    assert torch.equal(moment, kept[1])


@given(side=st.integers(2, 9), rank=st.integers(1, 9), seed=SEEDS, is_told=st.booleans())
@relaxed
def test_divide_does_not_mind_features_of_very_different_size(side, rank, seed, is_told):
    """Sizes over 24 orders of magnitude, and a moment of any rank."""
    draw = torch.Generator().manual_seed(seed)
    sizes = 10 ** (24 * torch.rand(side, generator=draw, dtype=torch.float64) - 12)
    tokens = 4 * side if rank >= side else rank
    moment = moment_of(seed + 1, tokens, side)
    matrix = normal(seed + 2, 3, side) @ moment
    plain = divide(matrix, moment, tokens if is_told else None)
    found = divide(matrix * sizes, scaled_to(moment, sizes), tokens if is_told else None)
    spread = torch.linalg.eigvalsh(correlation(moment))[-min(tokens, side) :]
    worst = float(spread[-1] / spread[0])
    assume(worst < 1e6)
    bound = LINALG * worst * (1 + float(plain.abs().max()))
    torch.testing.assert_close(found * sizes, plain, rtol=0, atol=bound)


@given(side=st.integers(2, 9), data=st.data(), seed=SEEDS)
@relaxed
def test_divide_inverts_a_singular_moment_on_its_range(side, data, seed):
    """With a unit diagonal nothing is rescaled, and it is the Moore-Penrose inverse."""
    tokens = data.draw(st.integers(1, side - 1), label="tokens")
    moment = correlation(moment_of(seed, tokens, side))
    spread = torch.linalg.eigvalsh(moment)[-tokens:]
    assume(float(spread[0]) > 1e-3 * float(spread[-1]))
    matrix = normal(seed + 1, 4, side)
    expected = matrix @ torch.linalg.pinv(moment, hermitian=True, rtol=1e-8)
    for told in (None, tokens):
        found = divide(matrix, moment, told)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.norm()))
    within = matrix @ moment
    torch.testing.assert_close(divide(within, moment) @ moment, within, rtol=0, atol=1e-10)


def test_divide_sees_a_singular_moment_that_has_a_cholesky_root():
    """Rank 7 of 8: rounding leaves a last pivot that is far above the roundoff."""
    moment = correlation(moment_of(8, 7, 8))
    root, info = torch.linalg.cholesky_ex(moment)
    assert int(info) == 0
    assert float(root.diagonal().square().min()) > 1e-14
    matrix = normal(9, 3, 8)
    expected = matrix @ torch.linalg.pinv(moment, hermitian=True, rtol=1e-8)
    torch.testing.assert_close(divide(matrix, moment), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [2, 40])
def test_divide_leaves_dead_features_out(tokens):
    live = moment_of(1, tokens, 4)
    moment = torch.zeros(6, 6, dtype=torch.float64)
    places = torch.tensor([0, 2, 3, 5])
    moment[places[:, None], places] = live
    matrix = normal(2, 3, 6)
    for told in (None, tokens):
        found = divide(matrix, moment, told)
        assert float(found[:, [1, 4]].abs().max()) == 0.0
        expected = divide(matrix[:, places], live, told)
        torch.testing.assert_close(found[:, places], expected, rtol=0, atol=1e-9)


def test_divide_by_nothing_is_nothing():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(divide(normal(1, 2, 3), zero), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(divide(normal(1, 2, 3), zero, 0), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("side", [4, 9])
def test_divide_takes_no_more_directions_than_there_were_tokens(side):
    """What a moment shows beyond them is rounding, and its inverse would be enormous."""
    clean = correlation(moment_of(3, 2, side))
    mixing = normal(4, side, side)
    moment = clean + 1e-9 * symmetrize(mixing @ mixing.mT)
    matrix = normal(5, 3, side)
    expected = divide(matrix, clean, 2)
    found = divide(matrix, moment, 2)
    size = float(expected.norm())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * size)
    assert float(divide(matrix, moment).norm()) > 1e4 * size


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divide_refuses_what_is_not_finite(value):
    moment = torch.eye(3, dtype=torch.float64)
    moment[1, 2] = moment[2, 1] = value
    with pytest.raises(NumericalError, match="the second moment holds 2 entries"):
        divide(normal(1, 2, 3), moment)
