"""A linear is called through its module wherever somebody could tell."""

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from slimrank.nn import LowRankLinear
from slimrank.nn.quick_linear import bare_weight, call_linear


def linear(bias=False) -> nn.Linear:
    return nn.Linear(5, 3, bias=bias)


def test_a_plain_linear_is_its_product():
    layer, inputs = linear(), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert bare_weight(layer) is layer.weight
    with patch.object(nn.Linear, "__call__", side_effect=AssertionError):
        outputs = call_linear(layer, inputs)
    assert torch.equal(outputs, layer(inputs))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_seen_and_so_is_their_end(register):
    layer = linear()
    handle = getattr(layer, register)(lambda *_: None)
    assert bare_weight(layer) is None
    handle.remove()
    assert bare_weight(layer) is layer.weight


@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook]
)
def test_hooks_of_all_modules_are_seen(register):
    layer = LowRankLinear(5, 4, rank=2, pivoted=True)
    called: list[nn.Module] = []
    handle = register(lambda module, *_: called.append(module))
    try:
        with torch.no_grad():
            layer(torch.ones(5))
    finally:
        handle.remove()
    assert sorted(map(id, called)) == sorted(map(id, (layer, layer.latent, layer.expand)))


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("child", ["latent", "expand"])
def test_what_a_hook_gives_is_taken(pivoted, child):
    layer = LowRankLinear(5, 4, rank=2, pivoted=pivoted, bias=False)
    getattr(layer, child).register_forward_hook(lambda *arguments: 0 * arguments[-1])
    zeros = layer(torch.ones(5)) == 0
    assert zeros.all() if child == "latent" or not pivoted else zeros[2:].all()


def test_a_forward_of_its_own_is_called():
    layer = linear()
    layer.forward = lambda inputs: inputs + 1  # as offloading replaces it
    assert call_linear(layer, torch.zeros(5)).tolist() == [1.0] * 5


def test_other_modules_are_called():
    class Adapted(nn.Linear):
        pass

    assert bare_weight(Adapted(5, 3, bias=False)) is None
    assert bare_weight(linear(bias=True)) is None
    wrapped = nn.Sequential(linear())
    assert bare_weight(wrapped) is None
    assert torch.equal(call_linear(wrapped, torch.ones(5)), wrapped[0](torch.ones(5)))
    parametrized = linear()
    nn.utils.parametrizations.orthogonal(parametrized)
    assert bare_weight(parametrized) is None


def test_gradients_go_through():
    layer, inputs = linear(), torch.ones(2, 5, requires_grad=True)
    call_linear(layer, inputs).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 5), 2.0))
    assert torch.equal(inputs.grad, layer.weight.detach().sum(0).expand(2, 5))
