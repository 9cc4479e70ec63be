import pytest
import torch

from slimrank.errors import NotPositiveDefiniteError, NumericalError, NumericalWarning
from slimrank.linalg import Moments
from slimrank.methods.svd_llm import SVDLLM


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_factors_of_the_paper(shape):
    """U_k S_k V_k^T L^-1, with the inverse that our form does without."""
    weight, tokens = normal(1, *shape), normal(2, 60, shape[1])
    moment = tokens.mT @ tokens / 60
    root = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    solved = SVDLLM().decompose(weight, Moments(moment, 60))
    for rank in range(1, min(shape) + 1):
        paper = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(solved.truncate(rank).dense(), paper, rtol=0, atol=1e-10)


def test_a_singular_moment_is_helped_with_a_warning():
    tokens = normal(3, 2, 5)
    moments = Moments(tokens.mT @ tokens / 2, 2)
    with pytest.warns(NumericalWarning, match="singular"):
        assert SVDLLM().decompose(normal(4, 4, 5), moments).jitter > 0


def test_a_moment_with_no_root_is_refused():
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError):
        SVDLLM().decompose(normal(5, 3, 2), Moments(indefinite, 1))


def test_a_moment_that_is_not_finite_is_refused():
    bad = torch.full((2, 2), float("nan"), dtype=torch.float64)
    with pytest.raises(NumericalError, match="second moment"):
        SVDLLM().decompose(normal(5, 3, 2), Moments(bad, 1))
