"""Compiles pivoted layers, in a process of its own: run-time checks of types cannot be traced."""

import sys

import torch
from torch import Tensor, nn

from slimrank.linalg import decompose_outputs
from slimrank.nn import LowRankLinear, row_placement


def normal(seed: int, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def made(seed: int) -> LowRankLinear:
    linear = nn.Linear(8, 9, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(seed, 9, 8))
    factors = decompose_outputs(linear.weight.detach()).truncate(4)
    return LowRankLinear.from_factors(linear, factors, pivoted=True)


def compiled(layer: LowRankLinear, backend: str) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend=backend)


def assert_same(fast: nn.Module, layer: LowRankLinear) -> None:
    """Against the dense product: outputs with and without a graph of autograd, and gradients."""
    inputs = normal(9, 3, 8)
    expected = layer.to_linear()(inputs)
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast(inputs), expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(fast(inputs).square().sum(), list(layer.parameters()))
    outputs = inputs @ layer.latent.weight.mT @ layer.expansion().mT + layer.bias
    dense = torch.autograd.grad(outputs.square().sum(), list(layer.parameters()))
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def main(backend: str) -> None:
    layer, other = made(20), made(30)
    assert layer.pivots.tolist() != other.pivots.tolist()
    # rows are derived in the graph
    inputs = normal(1, 2, 8)
    cold = compiled(layer, backend)
    outputs = cold(inputs)
    torch.testing.assert_close(outputs, layer.to_linear()(inputs), rtol=0, atol=1e-12)
    # and taken as they are, once they are known
    layer(inputs)
    derive, row_placement.other_rows = row_placement.other_rows, None
    fast = compiled(layer, backend)
    fast(inputs)
    row_placement.other_rows = derive
    assert_same(fast, layer)
    for assign in (False, True):
        for source in (other, made(20)):
            layer.load_state_dict(source.state_dict(), assign=assign)
            with torch.no_grad():
                outputs = fast(inputs)
                expected = source.to_linear()(inputs)
                torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
            assert_same(fast, layer)
    layer.pivots = (8 - layer.pivots).flip(0)
    assert_same(fast, layer)


if __name__ == "__main__":
    main(sys.argv[1])
