import pytest
import torch

from slimrank.linalg import Moments
from slimrank.methods.svd import SVD


def test_it_is_the_truncated_svd_by_hand():
    solved = SVD().decompose(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    assert solved.singular_values.tolist() == pytest.approx([3.0, 2.0, 1.0])
    assert solved.loss(1) == pytest.approx(5.0)
    expected = torch.diag(torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(solved.truncate(2).dense(), expected)


def test_moments_are_not_looked_at():
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 3, generator=draw)
    bare = SVD().decompose(weight)
    odd = Moments(original=torch.full((3, 3), float("nan"), dtype=torch.float64), tokens=0)
    given = SVD().decompose(weight, odd)
    assert torch.equal(bare.basis, given.basis)
    assert torch.equal(bare.singular_values, given.singular_values)
