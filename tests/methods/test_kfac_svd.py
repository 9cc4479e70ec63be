from dataclasses import replace

import pytest
import torch

from slimrank.linalg import Moments, decompose_in_metric
from slimrank.methods.kfac_svd import KFACSVD
from slimrank.methods.swift_svd import SwiftSVD


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def moments_of(inputs: torch.Tensor, gradients: torch.Tensor) -> Moments:
    metric = gradients.mT @ gradients / len(gradients)
    return Moments(inputs.mT @ inputs / len(inputs), len(inputs), metric=metric)


def test_the_output_that_the_loss_feels_is_kept_first():
    """White inputs: swift-svd keeps the larger output, and here the other counts four times."""
    weight = torch.diag(torch.tensor([1.0, 1.5]))
    metric = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    moments = Moments(torch.eye(2, dtype=torch.float64), 9, metric=metric)
    plain = SwiftSVD().decompose(weight, moments)
    assert plain.truncate(1).dense().tolist() == [[0.0, 0.0], [0.0, 1.5]]
    solved = KFACSVD(damping=0.0).decompose(weight, moments)
    assert solved.truncate(1).dense().tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert solved.loss(1) == pytest.approx(2.25)
    # a tenth of the mean diagonal, 2.5, makes the metric 4.25 and 1.25
    assert KFACSVD(damping=0.1).decompose(weight, moments).loss(1) == pytest.approx(1.25 * 2.25)


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_map_of_the_paper(shape):
    """L_B^-T (L_B^T W L_A)_r L_A^-1, with both roots and both inverses."""
    out, inner = shape
    weight, moments = normal(1, *shape), moments_of(normal(2, 60, inner), normal(3, 60, out))
    method = KFACSVD()
    first = torch.linalg.cholesky(moments.original)
    second = torch.linalg.cholesky(
        moments.metric
        + 1e-2 * moments.metric.diagonal().mean() * torch.eye(out, dtype=torch.float64)
    )
    left, values, right = torch.linalg.svd(second.mT @ weight @ first, full_matrices=False)
    solved = method.decompose(weight, moments)
    torch.testing.assert_close(solved.singular_values, values, rtol=1e-10, atol=0)
    for rank in range(1, min(shape) + 1):
        kept = (left[:, :rank] * values[:rank]) @ right[:rank]
        paper = torch.linalg.inv(second).mT @ kept @ torch.linalg.inv(first)
        torch.testing.assert_close(solved.truncate(rank).dense(), paper, rtol=0, atol=1e-10)


def test_half_the_loss_is_the_rise_of_a_models_loss():
    """A quadratic loss of the outputs: its expected rise is exactly half of what is told."""
    weight, inputs = normal(1, 4, 6), normal(2, 500, 6)
    curvature = normal(3, 4, 4)
    curvature = curvature @ curvature.mT
    root = torch.linalg.cholesky(curvature)
    # gradients whose second moment is the curvature, as those of a log-likelihood have it
    moments = Moments(inputs.mT @ inputs / 500, 500, metric=root @ root.mT)
    method = KFACSVD(damping=0.0)
    factors = method.decompose(weight, moments).truncate(2)
    gaps = inputs @ (weight - factors.dense()).mT
    rise = float((0.5 * (gaps @ curvature) * gaps).sum(dim=1).mean())
    assert 0.5 * method.loss(weight, factors, moments) == pytest.approx(rise, rel=1e-9)


def test_few_tokens_and_few_gradients_need_no_jitter():
    weight = normal(1, 6, 5)
    solved = KFACSVD().decompose(weight, moments_of(normal(2, 2, 5), normal(3, 2, 6)))
    assert solved.jitter == 0.0
    assert solved.loss(2) <= 1e-11 * solved.energy
    torch.testing.assert_close(solved.truncate(5).dense(), weight, rtol=0, atol=1e-11)


def test_no_more_directions_are_known_than_there_were_tokens():
    """Beyond them the weight decides, in the metric; a ridge settles all of them."""
    weight, moments = normal(1, 6, 5), moments_of(normal(2, 40, 5), normal(3, 40, 6))
    method = KFACSVD()
    few = method.decompose(weight, replace(moments, tokens=2))
    all_known = method.decompose(weight, moments)
    expected = decompose_in_metric(weight, moments.original, method.metric(moments), tokens=2)
    assert torch.equal(few.basis, expected.basis)
    assert not torch.equal(few.basis[:, 2:], all_known.basis[:, 2:])
    held = replace(moments, magnitudes=normal(4, 5).abs()).ridged(0.1)
    assert torch.equal(held.metric, moments.metric)  # a ridge is of the inputs only
    assert torch.equal(held.magnitudes, normal(4, 5).abs())
    ridged = method.decompose(weight, replace(moments, tokens=2, ridge=0.1))
    assert torch.equal(ridged.basis, all_known.basis)


def test_without_a_metric_or_inputs_it_says_what_is_missing():
    weight, moments = normal(1, 3, 4), moments_of(normal(2, 9, 4), normal(3, 9, 3))
    method = KFACSVD()
    factors = method.decompose(weight, moments).truncate(1)
    bare = replace(moments, metric=None)
    for ask in (lambda: method.decompose(weight, bare), lambda: method.loss(weight, factors, bare)):
        with pytest.raises(ValueError, match="kfac-svd needs moments of the loss gradients"):
            ask()
    with pytest.raises(ValueError, match="kfac-svd needs moments of the original activations"):
        method.decompose(weight, replace(moments, original=None, shifted=moments.original))
