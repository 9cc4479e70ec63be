"""Predicted changes: Zero Sum SVD's formula without its root, in a metric too."""

from itertools import pairwise

import pytest
import torch

from slimrank.linalg import (
    decompose_in_metric,
    decompose_outputs,
    decompose_whitened,
    predicted_changes,
)
from tolerances import TOLERANCE

WEIGHTS = TOLERANCE["weights", torch.float64]


def normal(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def second_moment(seed, features, tokens=40):
    inputs = normal(seed, tokens, features) * torch.linspace(1, 4, features, dtype=torch.float64)
    return inputs.mT @ inputs / tokens


def as_in_the_paper(weight, moment, gradient):
    """``−σ_i u_iᵀ G L⁻ᵀ v_i``, with a Cholesky root and its inverse."""
    root = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    sensitivity = (left.mT @ gradient @ torch.linalg.inv(root).mT @ right.mT).diagonal()
    return -values * sensitivity


def assert_close(found, wanted):
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm()) <= WEIGHTS * float(wanted.norm())


@pytest.mark.parametrize("shape", [(9, 9), (5, 9), (9, 5)])
@pytest.mark.parametrize("decompose", [decompose_outputs, decompose_whitened])
def test_it_is_the_papers_formula(shape, decompose):
    weight, gradient, moment = normal(1, *shape), normal(2, *shape), second_moment(3, shape[1])
    found = predicted_changes(decompose(weight, moment), gradient)
    assert_close(found, as_in_the_paper(weight, moment, gradient))


def test_without_a_moment_it_is_that_of_the_plain_svd():
    weight, gradient = normal(1, 9, 9), normal(2, 9, 9)
    found = predicted_changes(decompose_outputs(weight), gradient)
    assert_close(found, as_in_the_paper(weight, torch.eye(9, dtype=torch.float64), gradient))


@pytest.mark.parametrize("shape", [(9, 9), (5, 9), (9, 5)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_in_a_metric_it_is_the_change_along_what_is_dropped(shape, diagonal):
    """To first order a weight that moves by Δ changes the loss by ``⟨G, Δ⟩``."""
    weight, gradient, moment = normal(1, *shape), normal(2, *shape), second_moment(3, shape[1])
    metric = second_moment(4, shape[0])
    solved = decompose_in_metric(weight, moment, metric.diagonal() if diagonal else metric)
    found = predicted_changes(solved, gradient)
    best = [solved.truncate(rank).dense() for rank in range(min(shape) + 1)]
    wanted = [(gradient * (less - more)).sum() for less, more in pairwise(best)]
    assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("tokens", [3, 40])
def test_all_components_together_are_the_weight(tokens):
    """Open directions, which three tokens leave, included."""
    weight, gradient, moment = normal(1, 9, 9), normal(2, 9, 9), second_moment(3, 9, tokens)
    found = predicted_changes(decompose_outputs(weight, moment, tokens), gradient)
    assert_close(found.sum(), -(gradient * weight).sum())


def test_directions_that_no_token_takes_cannot_change_the_loss():
    """A gradient is a sum over the same tokens; what none of them feels is free."""
    inputs, gradients = normal(5, 3, 9), normal(6, 3, 9)
    weight, moment = normal(1, 9, 9), inputs.mT @ inputs / 3
    found = predicted_changes(decompose_outputs(weight, moment, 3), gradients.mT @ inputs / 3)
    assert float(found[3:].abs().max()) <= WEIGHTS * float(found.abs().max())
    assert float(found[:3].abs().min()) > 0.01
