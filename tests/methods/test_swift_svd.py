import warnings

import pytest
import torch

from slimrank.errors import NumericalError
from slimrank.linalg import Moments
from slimrank.methods.swift_svd import SwiftSVD


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_factors_of_the_paper(shape):
    """Y = X W with rows as tokens: A_k = W V_k, B_k = V_k^T, loss^2 the tail of Y's spectrum."""
    out, inner = shape
    tokens, paper_weight = normal(1, 60, inner), normal(2, inner, out)
    outputs = tokens @ paper_weight
    _, values, right = torch.linalg.svd(outputs, full_matrices=False)
    moments = Moments(tokens.mT @ tokens / 60, 60)
    solved = SwiftSVD().decompose(paper_weight.mT.contiguous(), moments)
    for rank in range(1, min(shape) + 1):
        top = right[:rank].mT
        paper = (paper_weight @ top) @ top.mT
        found = solved.truncate(rank)
        torch.testing.assert_close(found.dense().mT, paper, rtol=0, atol=1e-10)
        assert solved.loss(rank) == pytest.approx(
            float(values[rank:].square().sum()) / 60, abs=1e-11 * solved.energy
        )


def test_few_tokens_need_no_jitter_and_no_warning():
    tokens = normal(3, 2, 5)
    moments = Moments(tokens.mT @ tokens / 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = SwiftSVD().decompose(normal(4, 4, 5), moments)
    assert solved.jitter == 0.0
    assert solved.loss(2) <= 1e-12 * solved.energy


def test_a_moment_that_is_not_finite_is_refused():
    bad = torch.full((2, 2), float("nan"), dtype=torch.float64)
    with pytest.raises(NumericalError, match="second moment"):
        SwiftSVD().decompose(normal(5, 3, 2), Moments(bad, 1))
