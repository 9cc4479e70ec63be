import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimrank.linalg import Factors, decompose_outputs
from slimrank.nn import LowRankLinear
from tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
relaxed = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def dense_linear(out=6, inner=8, bias=True, dtype=torch.float64) -> nn.Linear:
    linear = nn.Linear(inner, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(1, out, inner))
        if bias:
            linear.bias.copy_(normal(2, out))
    return linear


def made(rank=3, pivoted=False, **kwargs) -> tuple[nn.Linear, Factors, LowRankLinear]:
    linear = dense_linear(**kwargs)
    factors = decompose_outputs(linear.weight.detach()).truncate(rank)
    return linear, factors, LowRankLinear.from_factors(linear, factors, pivoted)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys_and_shapes(bias):
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in LowRankLinear(8, 6, rank=2, bias=bias).state_dict().items()
    }
    expected = {"latent.weight": (2, 8), "expand.weight": (6, 2), "weight": (0,)}
    assert shapes == (expected | {"bias": (6,)} if bias else expected)
    linear, _, layer = made(rank=2, bias=bias)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == shapes
    assert (linear.bias is None) == (not bias)


def test_the_sentinel_is_no_parameter_and_the_children_are_linears():
    layer = LowRankLinear(8, 6, rank=2)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"latent.weight", "expand.weight", "bias"}
    for child in (layer.latent, layer.expand):
        assert type(child) is nn.Linear
        assert child.bias is None
    assert (layer.in_features, layer.out_features, layer.rank) == (8, 6, 2)


def test_a_plain_linear_refuses_the_state_and_the_layer_refuses_a_plain_one():
    layer, linear = LowRankLinear(8, 6, rank=2), nn.Linear(8, 6)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linear.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(linear.state_dict(), strict=False)


@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
    bias=st.booleans(),
    pivoted=st.booleans(),
    batch=st.lists(st.integers(1, 4), max_size=3),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
@relaxed
def test_forward_is_the_dense_product(out, inner, bias, pivoted, batch, data, seed):
    rank = data.draw(st.integers(1, min(out, inner)), label="rank")
    linear = dense_linear(out, inner, bias)
    factors = Factors(normal(seed, out, rank), normal(seed + 1, rank, inner))
    layer = LowRankLinear.from_factors(linear, factors, pivoted)
    inputs = normal(seed + 2, *batch, inner)
    expected = inputs @ (factors.left @ factors.right).mT
    if bias:
        expected = expected + linear.bias
    found = layer(inputs)
    assert found.shape == (*batch, out)
    scale = max(float(factors.left.norm() * factors.right.norm() * inputs.norm()), 1.0)
    atol = TOLERANCE["forward", torch.float64] * scale * (10 if pivoted else 1)  # solved for
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pivoted", [False, True])
def test_forward_in_each_dtype(dtype, pivoted):
    linear, factors, layer = made(dtype=dtype, pivoted=pivoted)
    inputs = normal(3, 5, 8, dtype=dtype)
    with torch.no_grad():
        found = layer(inputs)
    assert found.dtype == dtype
    exact = inputs.double() @ factors.dense().mT + linear.bias.detach().double()
    error = float((found.double() - exact).norm() / exact.norm())
    assert error <= TOLERANCE["forward", dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_from_factors_takes_the_place_of_the_linear(dtype, bias, training, requires_grad):
    linear = dense_linear(bias=bias, dtype=dtype).requires_grad_(requires_grad).train(training)
    factors = decompose_outputs(linear.weight).truncate(3)
    layer = LowRankLinear.from_factors(linear, factors)
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.rank) == (8, 6, 3)
    for module in layer.modules():
        assert module.training is training
    for parameter in (layer.latent.weight, layer.expand.weight):
        assert isinstance(parameter, nn.Parameter)
        assert parameter.dtype == dtype
        assert parameter.device == linear.weight.device
        assert parameter.requires_grad is requires_grad
        assert parameter.is_contiguous()
    # cast once, from float64
    assert torch.equal(layer.latent.weight, factors.right.to(dtype))
    assert torch.equal(layer.expand.weight, factors.left.to(dtype))
    assert layer.weight.shape == (0,)
    assert layer.weight.dtype == dtype
    assert not layer.weight.requires_grad


def test_from_factors_leaves_the_linear_alone():
    linear, _, layer = made()
    kept = linear.weight.detach().clone()
    with torch.no_grad():
        layer.latent.weight.zero_()
        layer.expand.weight.zero_()
    assert torch.equal(linear.weight, kept)


def test_from_factors_of_a_linear_on_meta():
    with torch.device("meta"):
        linear = nn.Linear(8, 6)
    layer = LowRankLinear.from_factors(linear, Factors(normal(1, 6, 2), normal(2, 2, 8)))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_factors_are_those_it_was_made_of():
    _, factors, layer = made()
    found = layer.factors()
    assert torch.equal(found.left, factors.left)
    assert torch.equal(found.right, factors.right)
    assert not found.left.requires_grad
    assert found.left.data_ptr() == layer.expand.weight.data_ptr()
    assert found.right.data_ptr() == layer.latent.weight.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pivoted", [False, True])
def test_to_linear_and_back(bias, training, pivoted):
    linear = dense_linear(bias=bias).train(training)
    factors = decompose_outputs(linear.weight).truncate(6)
    layer = LowRankLinear.from_factors(linear, factors, pivoted)
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert (back.in_features, back.out_features) == (8, 6)
    assert back.bias is linear.bias
    assert back.training is training
    assert back.weight.requires_grad
    assert back.weight.is_leaf
    torch.testing.assert_close(back.weight, linear.weight, rtol=0, atol=1e-13)
    inputs = normal(4, 3, 8)
    torch.testing.assert_close(back(inputs), layer(inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pivoted", [False, True])
def test_to_linear_of_a_frozen_layer_is_frozen_and_rounds_once(dtype, pivoted):
    _, _, layer = made(rank=24, out=32, inner=40, dtype=dtype, pivoted=pivoted)
    layer.requires_grad_(False)
    back = layer.to_linear()
    assert not back.weight.requires_grad
    assert back.weight.dtype == dtype
    factors = layer.factors()
    exact = factors.left.double() @ factors.right.double()
    assert torch.equal(back.weight, exact.to(dtype))


def test_gradients_reach_both_factors_the_bias_and_the_inputs():
    _, _, layer = made()
    inputs = normal(5, 4, 8).requires_grad_()
    downstream = normal(6, 4, 6)
    layer(inputs).backward(downstream)
    left, right = layer.expand.weight.detach(), layer.latent.weight.detach()
    seen = inputs.detach()
    expected = {
        "expand.weight": downstream.mT @ (seen @ right.mT),
        "latent.weight": left.mT @ downstream.mT @ seen,
        "bias": downstream.sum(dim=0),
    }
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs.grad, downstream @ left @ right, rtol=0, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts_take_the_sentinel_along(dtype):
    _, _, layer = made()
    cast = layer.half() if dtype == torch.float16 else layer.to(dtype)
    assert cast is layer
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == dict.fromkeys(
        ["latent.weight", "expand.weight", "bias", "weight"], dtype
    )
    assert layer.weight.shape == (0,)
    assert layer(normal(7, 2, 8, dtype=dtype)).dtype == dtype


def test_a_deep_copy_is_apart_and_the_same():
    _, _, layer = made()
    other = copy.deepcopy(layer)
    inputs = normal(8, 3, 8)
    expected = layer(inputs).detach().clone()
    assert torch.equal(other(inputs), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(layer(inputs), expected)
    assert not torch.equal(other(inputs), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_loads_strictly(bias):
    _, _, layer = made(bias=bias)
    fresh = LowRankLinear(8, 6, rank=3, bias=bias, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    inputs = normal(9, 3, 8)
    assert torch.equal(fresh(inputs), layer(inputs))
    with torch.device("meta"):
        skeleton = LowRankLinear(8, 6, rank=3, bias=bias)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton(inputs), layer(inputs))


def test_a_state_dict_of_another_rank_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for latent"):
        LowRankLinear(8, 6, rank=3).load_state_dict(LowRankLinear(8, 6, rank=2).state_dict())


def test_a_new_layer_has_a_zero_bias_and_takes_dtype_and_device():
    layer = LowRankLinear(8, 6, rank=2, device="meta", dtype=torch.bfloat16)
    for tensor in layer.state_dict().values():
        assert tensor.device.type == "meta"
        assert tensor.dtype == torch.bfloat16
    assert torch.equal(LowRankLinear(8, 6, rank=2).bias, torch.zeros(6))
    assert LowRankLinear(8, 6, rank=2, bias=False).bias is None


def test_its_repr_shows_the_sides_and_the_rank():
    text = repr(LowRankLinear(8, 6, rank=2, bias=False))
    assert "in_features=8, out_features=6, rank=2, bias=False" in text
    assert "(latent): Linear(in_features=8, out_features=2, bias=False)" in text
    assert "(expand): Linear(in_features=2, out_features=6, bias=False)" in text


@pytest.mark.parametrize("pivoted", [False, True])
def test_latents_are_heard_and_expanded(pivoted):
    _, _, layer = made(pivoted=pivoted)
    inputs, heard = normal(3, 4, 5, 8), []
    names = list(layer.state_dict())
    layer.on_latent = heard.append
    outputs = layer(inputs)
    assert len(heard) == 1
    assert torch.equal(heard[0], layer.latent(inputs))
    assert torch.equal(layer.expand_latents(heard[0]), outputs)
    assert list(layer.state_dict()) == names
    layer.on_latent = None
    assert torch.equal(layer(inputs), outputs)
    assert len(heard) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_trained", [True, False])
def test_an_unfilled_layer_takes_another_ones_state(bias, is_trained):
    linear, _, layer = made(bias=bias, dtype=torch.float32)
    linear.requires_grad_(is_trained).train(is_trained)
    unfilled = LowRankLinear.unfilled(linear, 3)
    unfilled.load_state_dict(layer.state_dict())
    inputs = normal(5, 4, 8, dtype=torch.float32)
    assert torch.equal(unfilled(inputs), layer(inputs))
    assert unfilled.training == is_trained
    assert all(p.requires_grad == is_trained for p in unfilled.parameters())
    on_meta = LowRankLinear.unfilled(linear, 3, "meta")
    assert {t.device.type for t in on_meta.state_dict().values()} == {"meta"}
    assert on_meta.latent.weight.dtype == torch.float32
