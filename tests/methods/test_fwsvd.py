import pytest
import torch

from slimrank.linalg import Moments
from slimrank.methods.fwsvd import FWSVD
from slimrank.methods.svd import SVD


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def moments_of(*row_weights: float) -> Moments:
    weights = torch.tensor(row_weights, dtype=torch.float64)
    return Moments(None, 0, row_weights=weights)


def test_the_row_with_the_larger_gradient_is_kept_first():
    weight = torch.diag(torch.tensor([1.0, 1.5]))
    solved = FWSVD().decompose(weight, moments_of(4.0, 1.0))
    assert solved.singular_values.tolist() == pytest.approx([2.0, 1.5], rel=1e-5)
    assert solved.truncate(1).dense().tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert SVD().decompose(weight).truncate(1).dense().tolist() == [[0.0, 0.0], [0.0, 1.5]]


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_factors_of_the_paper(shape):
    """I^-1 U S and V^T of the SVD of I W, with I the root of the row sums."""
    weight, sums = normal(1, *shape), 1 + normal(2, shape[0]).square()
    scale = (sums + 1e-6 * sums.mean()).sqrt()[:, None]
    left, values, right = torch.linalg.svd(scale * weight, full_matrices=False)
    solved = FWSVD().decompose(weight, moments_of(*sums.tolist()))
    for rank in range(1, min(shape) + 1):
        paper = (left[:, :rank] * values[:rank] / scale) @ right[:rank]
        torch.testing.assert_close(solved.truncate(rank).dense(), paper, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [0.0, 1e-12, 5.0])
def test_even_rows_are_plain_svd(size):
    """Also where no row has a gradient at all."""
    weight = normal(1, 5, 4)
    solved, plain = FWSVD().decompose(weight, moments_of(*[size] * 5)), SVD().decompose(weight)
    for rank in range(5):
        found, expected = solved.truncate(rank).dense(), plain.truncate(rank).dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_row_without_a_gradient_comes_last_and_is_still_there():
    weight = normal(1, 4, 6)
    solved = FWSVD().decompose(weight, moments_of(1.0, 0.0, 2.0, 3.0))
    others = [0, 2, 3]
    gap = weight - solved.truncate(3).dense()
    assert float(gap[others].norm()) < 1e-4
    assert float(gap[1].norm()) > 0.1
    assert float(solved.singular_values[3]) > 0
    torch.testing.assert_close(solved.truncate(4).dense(), weight, rtol=0, atol=1e-11)


def test_without_row_weights_it_says_what_is_missing():
    seen = Moments(torch.eye(4, dtype=torch.float64), 3)
    with pytest.raises(ValueError, match="fwsvd needs moments of the weight gradients"):
        FWSVD().decompose(normal(1, 3, 4), seen)
