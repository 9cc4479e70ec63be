"""Linears in eight bits give what their codes stand for, in every dtype, and refuse bad scales."""

import copy

import pytest
import torch
from torch import nn

from slimrank import LowRankLinear
from slimrank.errors import CheckpointError
from slimrank.linalg import Factors
from slimrank.nn import Int8Factor, Int8Linear, has_int8_factors, round_factors
from tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_layer(pivoted, dtype, bias=True):
    linear = nn.Linear(24, 20, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random(20, 24, seed=2))
    factors = Factors(random(20, 6), random(6, 24, seed=1))
    return LowRankLinear.from_factors(linear, factors, pivoted=pivoted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_linear_multiplies_codes_by_scales(dtype):
    linear = nn.Linear(24, 20, dtype=dtype)
    layer = Int8Linear.from_linear(linear)
    inputs = random(5, 24, dtype=dtype)
    matrix = layer.codes.double() * layer.scale.double()[:, None]
    expected = inputs.double() @ matrix.mT + linear.bias.double()
    found = layer(inputs)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= TOLERANCE["forward", dtype] * expected.norm()
    assert torch.equal(layer.to_linear().weight, layer.matrix())
    assert layer.to_linear().bias is linear.bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rounded_factors_run_and_stay_near(pivoted, dtype, bias):
    layer = make_layer(pivoted, dtype, bias)
    before = layer.to_linear().weight.double()
    round_factors(layer)
    assert has_int8_factors(layer)
    assert {n: t.dtype for n, t in layer.state_dict().items() if "codes" in n} == {
        "latent.codes": torch.int8,
        "expand.codes": torch.int8,
    }
    inputs = random(7, 24, dtype=dtype)
    after = layer.factors()
    expected = inputs.double() @ (after.left.double() @ after.right.double()).mT
    expected = expected + (layer.bias.double() if bias else 0)
    off = (layer(inputs).double() - expected).norm()
    assert off <= 2 * TOLERANCE["forward", dtype] * expected.norm()  # two products
    again = layer.to_linear().weight.double()
    assert 0 < (again - before).norm() < 0.02 * before.norm()


def test_large_sums_do_not_overflow_in_float16():
    layer = Int8Linear.from_linear(nn.Linear(1024, 4, bias=False, dtype=torch.float16))
    layer.codes.fill_(127)
    layer.scale.fill_(1e-4)
    assert torch.isfinite(layer(torch.full((1024,), 4.0, dtype=torch.float16))).all()


def test_a_pivoted_layer_of_full_rank_has_an_empty_second_factor():
    linear = nn.Linear(24, 6, bias=False)
    layer = LowRankLinear.from_factors(linear, Factors(torch.eye(6), random(6, 24).float()), True)
    round_factors(layer)
    assert layer.expand.codes.shape == (0, 6)
    assert layer(torch.ones(3, 24)).shape == (3, 6)


def test_casts_copies_and_state_go_round():
    layer = make_layer(False, torch.float32)
    round_factors(layer)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.latent.codes, layer.latent.codes)
    halved = copied.half()
    assert halved.latent.codes.dtype == torch.int8
    assert halved(torch.ones(24, dtype=torch.float16)).dtype == torch.float16
    fresh = make_layer(False, torch.float32)
    round_factors(fresh)
    fresh.latent.codes.zero_()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(torch.ones(24)), layer(torch.ones(24)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_hostile_scale_is_refused(bad):
    factor = Int8Factor.rounded(random(4, 3))
    state = factor.state_dict()
    state["scale"] = state["scale"].clone()
    state["scale"][2] = bad
    with pytest.raises(CheckpointError, match="not finite or negative in row 2"):
        factor.load_state_dict(state)


def test_codes_of_another_dtype_are_refused():
    layer = Int8Linear(3, 4)
    state = layer.state_dict() | {"codes": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError, match=r"torch\.float32, not torch\.int8"):
        layer.load_state_dict(state)
