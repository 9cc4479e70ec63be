from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from slimrank.linalg import Decomposition, Moments
from slimrank.methods import AASVD, method_by_name
from slimrank.methods.aa_svd import ShiftAware
from slimrank.methods.swift_svd import SwiftSVD


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def streams_of(tokens: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = normal(1, tokens, features)
    return x, 0.6 * x + 0.4 * normal(2, tokens, features)


def moments_of(x: torch.Tensor, z: torch.Tensor) -> Moments:
    tokens = len(x)
    return Moments(x.mT @ x / tokens, tokens, z.mT @ z / tokens, (x - z).mT @ z / tokens)


def assert_same_bits(first: Decomposition, second: Decomposition) -> None:
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.target, second.target)
    assert torch.equal(first.singular_values, second.singular_values)
    assert first.floor == second.floor


def test_what_it_looks_at_and_what_it_shrinks_by():
    assert AASVD.needs == {"original", "shifted"}
    assert ShiftAware.needs == {"shifted"}
    assert AASVD.default_ridge > 0  # a regression from few tokens is not to be trusted as it is
    assert ShiftAware.default_ridge == SwiftSVD.default_ridge == 0.0


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_it_gives_the_factors_of_the_paper(shape):
    """SVD_k(W C L⁻ᵀ) L⁻¹ with C = E x zᵀ and a Cholesky root of E z zᵀ."""
    weight, (x, z) = normal(3, *shape), streams_of(60, shape[1])
    root = torch.linalg.cholesky(z.mT @ z / 60)
    inverse = torch.linalg.inv(root)
    seen = weight @ (x.mT @ z / 60) @ inverse.mT
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    solved = AASVD().decompose(weight, moments_of(x, z))
    torch.testing.assert_close(solved.singular_values, values, rtol=1e-10, atol=1e-10)
    for rank in range(1, min(shape) + 1):
        paper = (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse
        torch.testing.assert_close(solved.truncate(rank).dense(), paper, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("method", [AASVD(), AASVD(anchor=0.5), ShiftAware()])
def test_before_anything_has_shifted_it_is_swift_svd(method, tokens):
    weight, (x, _) = normal(3, 6, 5), streams_of(tokens, 5)
    moments = Moments(x.mT @ x / tokens, tokens)
    plain = SwiftSVD().decompose(weight, moments)
    assert_same_bits(method.decompose(weight, moments), plain)
    factors = plain.truncate(2)
    assert method.loss(weight, factors, moments) == SwiftSVD().loss(weight, factors, moments)


@pytest.mark.parametrize("tokens", [3, 40])
def test_without_an_anchor_it_is_shift_aware(tokens):
    weight, streams = normal(3, 6, 5), streams_of(tokens, 5)
    moments = moments_of(*streams)
    plain = ShiftAware().decompose(weight, moments)
    assert_same_bits(AASVD(anchor=0.0).decompose(weight, moments), plain)
    factors = plain.truncate(2)
    loss = ShiftAware().loss(weight, factors, moments)
    assert AASVD(anchor=0.0).loss(weight, factors, moments) == loss
    z = streams[1]
    gap = z @ (weight - factors.dense()).mT
    assert loss == pytest.approx(float(gap.square().sum(dim=1).mean()), rel=1e-11)


def test_it_makes_good_what_went_wrong_upstream_and_shift_aware_does_not():
    """The inputs have shrunk to a half: one doubles the weight, the other leaves it."""
    weight, (x, _) = normal(3, 6, 5), streams_of(40, 5)
    moments = moments_of(x, x / 2)
    anchored = AASVD().decompose(weight, moments)
    torch.testing.assert_close(anchored.truncate(5).dense(), 2 * weight)
    assert anchored.loss(5) <= 1e-11 * anchored.energy
    followed = ShiftAware().decompose(weight, moments)
    torch.testing.assert_close(followed.truncate(5).dense(), weight)
    halves = [AASVD(anchor=a).decompose(weight, moments).target for a in (0.25, 0.5)]
    torch.testing.assert_close(halves[0], 1.25 * weight)
    torch.testing.assert_close(halves[1], 1.5 * weight)


def test_the_original_is_only_there_to_tell_the_floor():
    """Energy alone does as well, and the maps are the same to the bit."""
    weight, (x, z) = normal(3, 6, 5), streams_of(40, 5)
    full = moments_of(x, z)
    energy = float((x @ weight.mT).square().sum(dim=1).mean())
    lean = replace(full, original=None, output_energy=energy)
    expected, found = (AASVD().decompose(weight, moments) for moments in (full, lean))
    assert torch.equal(found.basis, expected.basis)
    assert found.floor == pytest.approx(expected.floor, rel=1e-10)
    assert found.floor > 0
    with pytest.raises(ValueError, match="energy of the original outputs"):
        AASVD().decompose(weight, replace(full, original=None))


def test_a_direction_that_never_arrives_keeps_what_the_weight_says():
    weight, (x, z) = normal(3, 6, 5), streams_of(40, 5)
    z[:, 2] = 0
    target = AASVD().decompose(weight, moments_of(x, z)).target
    assert torch.equal(target[:, 2], weight[:, 2])
    assert not torch.allclose(target[:, 1], weight[:, 1])


def test_its_default_ridge_draws_it_towards_the_weight():
    """On tokens it has not seen that is what pays, where it has seen few."""
    weight, (x, z) = normal(3, 8, 20), streams_of(424, 20)
    few = moments_of(x[:24], z[:24])
    free = AASVD().decompose(weight, few).target
    held = AASVD().decompose(weight, few.ridged(AASVD.default_ridge)).target
    unseen_x, unseen_z = x[24:], z[24:]
    free_loss, held_loss = (
        float((unseen_x @ weight.mT - unseen_z @ target.mT).square().sum(dim=1).mean())
        for target in (free, held)
    )
    assert float((held - weight).norm()) < float((free - weight).norm())
    assert held_loss < free_loss


def test_the_anchor_is_the_papers_by_default_and_fixed():
    assert AASVD().anchor == 1.0
    assert method_by_name("aa-svd") == AASVD(anchor=1.0)
    with pytest.raises(FrozenInstanceError):
        AASVD().anchor = 0.5
