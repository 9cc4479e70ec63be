import pytest
import torch

from slimrank.linalg import Moments
from slimrank.methods.asvd import ASVD
from slimrank.methods.svd import SVD


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def moments_of(*magnitudes: float) -> Moments:
    sizes = torch.tensor(magnitudes, dtype=torch.float64)
    return Moments(None, 0, magnitudes=sizes)


def test_the_larger_input_is_kept_first_and_alpha_says_how_much_larger():
    """Inputs 4 and 1 in size: with α = 1/2 the weights count as 1 · 2 and 3 · 1."""
    weight, moments = torch.diag(torch.tensor([1.0, 3.0])), moments_of(4.0, 1.0)
    half, whole = ASVD().decompose(weight, moments), ASVD(alpha=1.0).decompose(weight, moments)
    assert half.singular_values.tolist() == pytest.approx([3.0, 2.0])
    assert half.truncate(1).dense().tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert half.loss(1) == pytest.approx(4.0)
    assert whole.singular_values.tolist() == pytest.approx([4.0, 3.0])
    assert whole.truncate(1).dense().tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert ASVD(alpha=1.0).loss(weight, whole.truncate(1), moments) == pytest.approx(9.0)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_factors_of_the_paper(shape, alpha):
    """U S and V^T S^-1 of the SVD of W S, with the inverse that our form does without."""
    weight, sizes = normal(1, *shape), 0.1 + normal(2, shape[1]).abs()
    scale = sizes.pow(alpha)
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    solved = ASVD(alpha).decompose(weight, moments_of(*sizes.tolist()))
    for rank in range(1, min(shape) + 1):
        paper = (left[:, :rank] * values[:rank]) @ (right[:rank] / scale)
        torch.testing.assert_close(solved.truncate(rank).dense(), paper, rtol=0, atol=1e-10)


def test_alpha_zero_is_plain_svd():
    weight = normal(1, 5, 4)
    solved = ASVD(alpha=0.0).decompose(weight, moments_of(9.0, 0.1, 3.0, 1.0))
    plain = SVD().decompose(weight)
    for rank in range(5):
        found, expected = solved.truncate(rank).dense(), plain.truncate(rank).dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        assert solved.loss(rank) == pytest.approx(plain.loss(rank), abs=1e-11 * plain.energy)


def test_dead_inputs_are_no_trouble():
    weight = normal(1, 6, 4)
    solved = ASVD().decompose(weight, moments_of(2.0, 0.0, 1.0, 0.0))
    assert solved.loss(2) <= 1e-11 * solved.energy
    torch.testing.assert_close(solved.truncate(4).dense(), weight, rtol=0, atol=1e-11)


def test_without_magnitudes_it_says_what_is_missing():
    seen = Moments(torch.eye(4, dtype=torch.float64), 3)
    with pytest.raises(ValueError, match="asvd needs moments of the magnitudes"):
        ASVD().decompose(normal(1, 3, 4), seen)
