"""What stands in for our linears in a graph computes what they do."""

import pytest
import torch
from torch import nn

from slimrank.errors import ModelError
from slimrank.exporting.traceable import make_traceable
from slimrank.linalg import Factors
from slimrank.nn import Int8Linear, LowRankLinear, remap_factors, round_factors


@pytest.fixture
def make_linears():
    """`make_linears(pivoted, dtype)` gives a factorised linear and a dense one, with biases."""

    def make(pivoted=True, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        linears = [nn.Linear(12, 10, dtype=dtype) for _ in range(2)]
        for parameter in nn.ModuleList(linears).parameters():
            nn.init.normal_(parameter, generator=generator)
        left = torch.randn(10, 4, generator=generator, dtype=torch.float64)
        right = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        made = LowRankLinear.from_factors(linears[0], Factors(left, right), pivoted=pivoted)
        return nn.ModuleDict({"low": made, "dense": linears[1]})

    return make


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("in_int8", [False, True])
def test_outputs_are_the_same(pivoted, in_int8, make_linears):
    linears = make_linears(pivoted)
    if in_int8:
        round_factors(linears["low"])
        linears["dense"] = Int8Linear.from_linear(linears["dense"])
    inputs = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    before = [each(inputs) for each in linears.values()]
    assert make_traceable(linears) == 1 + in_int8
    for each, expected in zip(linears.values(), before, strict=True):
        torch.testing.assert_close(each(inputs), expected)
    kinds = {type(module).__name__ for module in linears.modules()}
    assert not kinds & {"Int8Factor", "Int8Linear"}
    assert ("LowRankLinear" in kinds) == (not pivoted)


def test_packed_factors_are_refused(make_linears):
    linears = make_linears(dtype=torch.bfloat16)
    remap_factors(linears["low"])
    with pytest.raises(ModelError, match="factors of low are packed"):
        make_traceable(linears)
