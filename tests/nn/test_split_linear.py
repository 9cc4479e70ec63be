"""A fused linear in three parts: the same function, the same rows, a state that loads."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimrank.errors import ModelError
from slimrank.linalg import decompose_outputs
from slimrank.nn import LowRankLinear, SplitLinear
from slimrank.nn.split_linear import compact_ranges
from tolerances import TOLERANCE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEYS, VALUES = (2, 3, 8, 9), (4, 5, 10, 11)  # of twelve: two heads of queries, keys and values


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def dense_linear(out=12, inner=8, bias=True, dtype=torch.float64) -> nn.Linear:
    linear = nn.Linear(inner, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(1, out, inner))
        if bias:
            linear.bias.copy_(normal(2, out))
    return linear


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys_and_shapes(bias):
    made = SplitLinear(8, 12, [(2, 4), (8, 10)], [(4, 5)], bias=bias)
    expected = {"rest.weight": (7, 8), "keys.weight": (4, 8), "values.weight": (1, 8)}
    if bias:
        expected |= {"rest.bias": (7,), "keys.bias": (4,), "values.bias": (1,)}
    assert {n: tuple(t.shape) for n, t in made.state_dict().items()} == expected | {"weight": (0,)}
    assert "weight" not in dict(made.named_parameters())
    split = SplitLinear.from_linear(dense_linear(bias=bias), (2, 3, 8, 9), (4,))
    assert {n: tuple(t.shape) for n, t in split.state_dict().items()} == {
        n: tuple(t.shape) for n, t in made.state_dict().items()
    }
    assert (split.key_ranges, split.value_ranges) == (((2, 4), (8, 10)), ((4, 5),))
    assert all(type(child) is nn.Linear for child in split.children())


def test_children_hold_the_rows_in_the_order_asked_for():
    linear = dense_linear()
    keys, values = (9, 8, 2, 3), (11, 4, 5)
    split = SplitLinear.from_linear(linear, keys, values)
    assert torch.equal(split.keys.weight, linear.weight[list(keys)])
    assert torch.equal(split.values.weight, linear.weight[list(values)])
    assert torch.equal(split.rest.weight, linear.weight[[0, 1, 6, 7, 10]])
    assert torch.equal(split.keys.bias, linear.bias[list(keys)])
    assert torch.equal(split.rest.bias, linear.bias[[0, 1, 6, 7, 10]])


@given(
    out=st.integers(2, 12),
    bias=st.booleans(),
    batch=st.lists(st.integers(1, 4), max_size=3),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_any_choice_of_rows_gives_the_same_function_and_comes_back(out, bias, batch, data, seed):
    rows = random.Random(seed).sample(range(out), out)
    first = data.draw(st.integers(1, out - 1))
    second = data.draw(st.integers(first + 1, out))
    linear = dense_linear(out, 5, bias)
    split = SplitLinear.from_linear(linear, rows[:first], rows[first:second])
    assert (split.rest is None) == (second == out)
    inputs = normal(seed, *batch, 5)
    expected = linear(inputs)
    scale = float(linear.weight.detach().norm() * inputs.norm()) + 1
    found = split(inputs)
    assert found.shape == (*batch, out)
    atol = TOLERANCE["forward", torch.float64] * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    back = split.to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert (back.bias is None) if not bias else torch.equal(back.bias, linear.bias)
    again = SplitLinear(5, out, split.key_ranges, split.value_ranges, bias, dtype=torch.float64)
    again.load_state_dict(split.state_dict())
    assert torch.equal(again(inputs), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_from_linear_takes_the_place_of_the_linear(dtype, training, requires_grad):
    linear = dense_linear(dtype=dtype).requires_grad_(requires_grad).train(training)
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    assert (split.in_features, split.out_features) == (8, 12)
    assert all(module.training is training for module in split.modules())
    for tensor in split.state_dict().values():
        assert tensor.dtype == dtype
    for parameter in split.parameters():
        assert parameter.requires_grad is requires_grad
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * dtype.itemsize
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in linear.parameters())
    assert split.to_linear().weight.requires_grad is requires_grad
    assert split.to_linear().training is training
    inputs = normal(3, 5, 8, dtype=dtype)
    exact = inputs.double() @ linear.weight.detach().double().mT + linear.bias.detach().double()
    error = float((split(inputs).detach().double() - exact).norm() / exact.norm())
    assert error <= TOLERANCE["forward", dtype]


def test_from_linear_leaves_the_linear_alone():
    linear = dense_linear()
    kept = linear.weight.detach().clone()
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
    assert torch.equal(linear.weight, kept)


def test_on_meta_then_loaded():
    linear = dense_linear()
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    ghosts = [
        SplitLinear(8, 12, split.key_ranges, split.value_ranges, True, "meta", torch.float64),
        SplitLinear.from_linear(copy.deepcopy(linear).to("meta"), KEYS, VALUES),
    ]
    for ghost in ghosts:
        assert {t.device.type for t in ghost.state_dict().values()} == {"meta"}
        assert ghost(torch.empty(3, 8, device="meta")).shape == (3, 12)
        ghost.load_state_dict(split.state_dict(), assign=True)
        inputs = normal(4, 3, 8)
        assert torch.equal(ghost(inputs), split(inputs))


def test_a_plain_linear_refuses_the_state_and_the_other_way_round():
    linear = dense_linear()
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linear.load_state_dict(split.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        split.load_state_dict(linear.state_dict(), strict=False)


@pytest.mark.parametrize("bias", [True, False])
def test_parts_may_be_of_low_rank(bias):
    linear = dense_linear(bias=bias)
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    factors = decompose_outputs(split.keys.weight.detach()).truncate(2)
    split.keys = LowRankLinear.from_factors(split.keys, factors)
    assert split.state_dict()["keys.weight"].shape == (0,)
    expected = linear.weight.detach().clone()
    expected[list(KEYS)] = factors.dense()
    assert torch.dist(expected, linear.weight) > 0.1  # the rank is a real cut
    inputs = normal(5, 3, 8)
    outputs = torch.nn.functional.linear(inputs, expected, linear.bias)
    torch.testing.assert_close(split(inputs), outputs, rtol=0, atol=1e-12)
    back = split.to_linear()
    torch.testing.assert_close(back.weight.detach(), expected, rtol=0, atol=1e-13)
    assert (back.bias is None) if not bias else torch.equal(back.bias, linear.bias)


def test_gradients_are_those_of_the_whole():
    linear = dense_linear()
    split = SplitLinear.from_linear(linear, KEYS, VALUES)
    inputs, downstream = normal(6, 4, 8), normal(7, 4, 12)
    linear(inputs).backward(downstream)
    split(inputs).backward(downstream)
    for child, rows in ((split.keys, KEYS), (split.values, VALUES), (split.rest, (0, 1, 6, 7))):
        torch.testing.assert_close(child.weight.grad, linear.weight.grad[list(rows)])
        torch.testing.assert_close(child.bias.grad, linear.bias.grad[list(rows)])


def test_copies_are_independent():
    split = SplitLinear.from_linear(dense_linear(), KEYS, VALUES)
    inputs = normal(8, 2, 8)
    before = split(inputs)
    other = copy.deepcopy(split)
    with torch.no_grad():
        other.keys.weight.zero_()
    assert torch.equal(split(inputs), before)
    assert not torch.equal(other(inputs), before)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([(0, 4)], [(3, 6)], "rows 3 to 6 .* overlap"),
        ([(0, 4), (2, 3)], [(6, 8)], "overlap"),
        ([(0, 4)], [(10, 13)], "rows 10 to 13 .* leave its 12 rows"),
        ([(-1, 4)], [(10, 12)], "rows -1 to 4"),
        ([], [(0, 2)], r"rows of keys, \[\], are no ranges"),
        ([(0, 2)], [(4, 4)], r"rows of values, \[\(4, 4\)\], are no ranges"),
        ([(0, 2)], [(4, 5, 6)], "rows of values"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(keys, values, message):
    with pytest.raises(ModelError, match=message):
        SplitLinear(8, 12, keys, values)


def test_ranges_as_json_gives_them():
    layer = SplitLinear(8, 12, [[2, 4], [8, 10]], [[4, 6]])
    assert layer.key_ranges == ((2, 4), (8, 10))


@given(st.lists(st.integers(0, 30), unique=True))
def test_compact_ranges_name_the_rows_in_order(rows):
    ranges = compact_ranges(rows)
    assert [row for start, stop in ranges for row in range(start, stop)] == rows
    assert all(left[1] != right[0] for left, right in pairwise(ranges))


def test_repr_says_how_many_rows():
    text = repr(SplitLinear(8, 12, [(2, 4), (8, 10)], [(4, 5)]))
    assert "in_features=8, out_features=12, key_rows=4, value_rows=1" in text
