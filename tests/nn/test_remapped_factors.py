"""Packed factors run as what they were packed from, and refuse what no packing gives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimrank import LowRankLinear
from slimrank.errors import CheckpointError, NumericalError
from slimrank.linalg import Factors, remapped_bytes, rounding_loss
from slimrank.nn import RemappedFactors, packed_factors, remap_factors
from tolerances import TOLERANCE

SIDES = [(20, 24), (24, 20), (16, 16)]


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_layer(sides=(20, 24), dtype=torch.bfloat16, bias=True, pivoted=False, rank=6):
    out_features, in_features = sides
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    factors = Factors(random(out_features, rank), random(rank, in_features, seed=1))
    return LowRankLinear.from_factors(linear, factors, pivoted=pivoted)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_factors_run_and_stay_near(sides, dtype, pivoted, bias):
    layer = make_layer(sides, dtype, bias, pivoted)
    before, matrix = layer.factors(), layer.to_linear().weight.double()
    remap_factors(layer)
    after = layer.factors()
    assert 0 < rounding_loss(before, after) < 1e-3
    assert (layer.to_linear().weight.double() - matrix).norm() < 0.03 * matrix.norm()
    inputs = random(7, sides[1], dtype=dtype)
    expected = inputs.double() @ (after.left.double() @ after.right.double()).mT
    expected = expected + (layer.bias.double() if bias else 0)
    found = layer(inputs)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 2 * TOLERANCE["forward", dtype] * expected.norm()


@pytest.mark.parametrize("sides", SIDES)
def test_tensors_have_one_name_and_the_bytes_that_are_counted(sides):
    layer = make_layer(sides, bias=False)
    remap_factors(layer)
    state = layer.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "remapped.packed": ((max(sides), 6), torch.int16),
        "remapped.latent_scale": ((6,), torch.bfloat16),
        "remapped.expand_scale": ((6,), torch.bfloat16),
        "weight": ((0,), torch.bfloat16),
    }
    assert sum(t.nbytes for t in state.values()) == remapped_bytes(*sides, 6)
    assert not list(layer.parameters())


def test_a_pivoted_layer_becomes_plain():
    layer = make_layer(pivoted=True)
    remap_factors(layer)
    assert not layer.pivoted
    assert "pivots" not in layer.state_dict()
    assert layer.factors().left.shape == (20, 6)


@pytest.mark.parametrize(("sides", "rank"), [((5, 1), 1), ((1, 5), 1), ((6, 9), 6), ((6, 6), 6)])
def test_the_smallest_and_largest_ranks(sides, rank):
    layer = make_layer(sides, rank=rank)
    before = layer.factors()
    remap_factors(layer)
    assert rounding_loss(before, layer.factors()) < 1e-3
    assert layer(torch.ones(3, sides[1], dtype=torch.bfloat16)).shape == (3, sides[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_cast_changes_the_scales_and_not_what_is_packed(dtype):
    layer = make_layer()
    remap_factors(layer)
    cast = copy.deepcopy(layer).to(dtype)
    factors = packed_factors(cast)
    assert torch.equal(factors.packed, packed_factors(layer).packed)
    assert factors.stored == torch.bfloat16
    inputs = random(7, 24, dtype=torch.bfloat16)
    found = cast(inputs.to(dtype))
    assert found.dtype == dtype
    expected = layer(inputs).double()
    tolerance = 2 * TOLERANCE["forward", torch.bfloat16]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_a_copy_has_tensors_of_its_own():
    layer = make_layer()
    remap_factors(layer)
    inputs = torch.ones(24, dtype=torch.bfloat16)
    before = layer(inputs)
    copied = copy.deepcopy(layer)
    packed_factors(copied).packed.zero_()
    assert torch.equal(copied(inputs), copied.bias)
    assert torch.equal(layer(inputs), before)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(inputs), before)


def test_latents_are_those_of_the_unpacked_factor():
    layer = make_layer(bias=False)
    remap_factors(layer)
    inputs = random(3, 24, dtype=torch.bfloat16)
    latents = F.linear(inputs, layer.latent.weight)
    seen = []
    layer.on_latent = seen.append
    assert torch.equal(layer(inputs), layer.expand_latents(latents))
    assert torch.equal(seen[0], latents)


def test_floats_of_32_bits_are_refused():
    with pytest.raises(NumericalError, match="no type of 16 bits"):
        remap_factors(make_layer(dtype=torch.float32))


@pytest.mark.parametrize("key", ["latent", "expand"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_hostile_scale_is_refused(key, bad):
    layer = make_layer()
    remap_factors(layer)
    state = copy.deepcopy(layer.state_dict())
    state[f"remapped.{key}_scale"][2] = bad
    with pytest.raises(
        CheckpointError, match=rf"the layer\.{key} is not finite or negative in row 2"
    ):
        layer.load_state_dict(state)


def test_rows_that_are_not_finite_are_refused():
    layer = make_layer()
    remap_factors(layer)
    state = copy.deepcopy(layer.state_dict())
    state["remapped.packed"][22, 1] = 0x7F80  # infinity in bfloat16
    with pytest.raises(CheckpointError, match="the layer is not finite in row 22"):
        layer.load_state_dict(state)
    packed_factors(layer).packed[21, 0] = 0x7FC0
    with pytest.raises(CheckpointError, match=r"q_proj is not finite in row 21"):
        packed_factors(layer).check("q_proj")


def test_packed_numbers_of_another_dtype_are_refused():
    factors = RemappedFactors(3, 4, 2, torch.bfloat16)
    state = factors.state_dict() | {"packed": torch.zeros(4, 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"torch\.int32, not torch\.int16"):
        factors.load_state_dict(state)
