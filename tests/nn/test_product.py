"""Which way round a product is taken changes its rounding, and nothing else."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from slimrank.nn import LowRankLinear, product
from slimrank.nn.product import FEW_TOKENS, apply_codes, apply_weight, are_columns, is_free
from slimrank.nn.row_placement import expand_into_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(autouse=True)
def _every_weight_is_large(monkeypatch):
    monkeypatch.setattr(product, "LARGE", 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 40),
    outputs=st.integers(1, 30),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_product(dtype, batch, width, outputs, seed):
    inputs, weight = normal(seed, *batch, width).to(dtype), normal(seed + 1, outputs, width)
    weight = weight.to(dtype)
    exact = inputs.double() @ weight.double().mT
    with torch.no_grad(), patch.object(product, "LARGE", 1):
        found = apply_weight(inputs, weight)
    assert found.shape == exact.shape
    assert found.dtype == dtype
    assert found.is_contiguous()
    bound = inputs.double().abs() @ weight.double().abs().mT
    assert ((found.double() - exact).abs() <= EPSILON[dtype] * (exact.abs() + width * bound)).all()


@pytest.mark.parametrize(
    ("dtype", "tokens", "way"),
    [
        (torch.bfloat16, 1, "mv"),
        (torch.float32, 1, "linear"),
        (torch.bfloat16, 2, "matmul"),
        (torch.float32, FEW_TOKENS, "matmul"),
        (torch.float32, FEW_TOKENS + 1, "linear"),
    ],
)
def test_the_way_follows_the_tokens(dtype, tokens, way):
    inputs, weight = torch.ones(1, tokens, 6, dtype=dtype), torch.ones(4, 6, dtype=dtype)
    with torch.no_grad(), torch.profiler.profile() as profile:
        apply_weight(inputs, weight)
    names = {event.key for event in profile.key_averages()}
    assert names & {"aten::mv", "aten::linear", "aten::matmul"} >= {f"aten::{way}"}
    assert ("aten::linear" in names) == (way == "linear")


def test_small_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(product, "LARGE", 25)
    with torch.no_grad():
        assert not are_columns(torch.ones(2, 6), torch.ones(4, 6))
        assert are_columns(torch.ones(2, 5), torch.ones(5, 5))


def test_gradients_are_those_of_a_linear():
    inputs = normal(0, 2, 6).requires_grad_()
    weight = nn.Parameter(normal(1, 4, 6))
    assert not is_free(inputs, weight)
    apply_weight(inputs, weight).sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad, weight.sum(0).expand(2, -1))


def test_autocast_is_respected():
    layer = LowRankLinear(6, 4, rank=2, bias=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for tokens in (1, 3):
            assert layer(torch.ones(1, tokens, 6)).dtype == torch.bfloat16


def test_other_kinds_of_tensors_are_left_to_the_linear():
    class Own(torch.Tensor):
        pass

    with torch.no_grad():
        assert is_free(torch.ones(2, 6), torch.ones(4, 6))
        assert not is_free(torch.ones(2, 6).as_subclass(Own), torch.ones(4, 6))
        assert not is_free(torch.ones(2, 6), torch.ones(4, 6).as_subclass(Own))
        assert not is_free(torch.ones(2, 6), torch.ones(4, 6, dtype=torch.bfloat16))
        assert not is_free(torch.ones(2, 6, device="meta"), torch.ones(4, 6, device="meta"))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of row numbers, which are fixed
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_holds_for_any_number_of_tokens():
    layer = LowRankLinear(6, 5, rank=2, pivoted=True)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.ones(2, 6), check_trace=False)
        inputs = normal(0, 7, 6).float()
        torch.testing.assert_close(traced(inputs), layer(inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, FEW_TOKENS, FEW_TOKENS + 1, 300])
@pytest.mark.parametrize("rank", [1, 2, 7, 9])
def test_rows_of_a_pivoted_linear_are_placed_alike(dtype, tokens, rank):
    layer = LowRankLinear(6, 9, rank=rank, bias=False, dtype=dtype, pivoted=True)
    layer.pivots = torch.randperm(9, generator=torch.Generator().manual_seed(rank))[:rank].int()
    latents = normal(tokens, 1, tokens, rank).to(dtype)
    exact = functional.linear(latents.double(), layer.expansion().detach().double())
    with torch.no_grad():
        found = expand_into_rows(latents, layer.expand, layer.row_numbers())
    assert found.is_contiguous()
    assert torch.equal(found[..., layer.pivots.long()], latents)  # not a bit is lost
    torch.testing.assert_close(found.double(), exact, rtol=4 * EPSILON[dtype], atol=EPSILON[dtype])


@pytest.mark.parametrize("tokens", [2, 300])
def test_what_is_no_number_stays_in_its_token(tokens):
    layer = LowRankLinear(6, 9, rank=2, bias=False, dtype=torch.bfloat16, pivoted=True)
    latents = torch.ones(1, tokens, 2, dtype=torch.bfloat16)
    latents[0, 0] = torch.nan
    with torch.no_grad():
        found = expand_into_rows(latents, layer.expand, layer.row_numbers())
    assert found[0, 0].isnan().all()
    assert found[0, 1:].isfinite().all()


@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.lists(st.integers(0, 5), max_size=2),
    width=st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 48])),
    outputs=st.integers(0, 30),
    seed=st.integers(0, 2**16),
)
def test_codes_and_scales_give_the_product(dtype, batch, width, outputs, seed):
    inputs = normal(seed, *batch, width).to(dtype)
    codes = (50 * normal(seed + 1, outputs, width)).clamp(-127, 127).to(torch.int8)
    scale = normal(seed + 2, outputs).abs().to(dtype) / 50
    matrix = codes.double() * scale.double()[:, None]
    with torch.no_grad():
        found = apply_codes(inputs, codes, scale)
    assert found.shape == (*batch, outputs)
    assert found.dtype == dtype
    bound = inputs.double().abs() @ matrix.abs().mT
    error = (found.double() - inputs.double() @ matrix.mT).abs()
    assert (error <= EPSILON[dtype] * (width + 2) * bound).all()


@pytest.mark.skipif(
    not product._has_kernel(),
    reason="this CPU has no kernel for codes",
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_few_tokens_of_bfloat16_read_codes_as_they_are(is_compiled):
    codes = torch.ones(4, 16, dtype=torch.int8)
    scale = torch.ones(4, dtype=torch.bfloat16)
    compiled = torch.compile(apply_codes, dynamic=True, backend="eager", fullgraph=True)
    half, whole = torch.bfloat16, torch.float32
    for tokens, dtype, few in [(1, half, True), (9, half, False), (1, whole, False)]:
        inputs = torch.ones(tokens, 16, dtype=dtype)
        with torch.no_grad(), torch.profiler.profile() as profile:
            (compiled if is_compiled else apply_codes)(inputs, codes, scale.to(dtype))
        names = {event.key for event in profile.key_averages()}
        assert ("aten::_weight_int8pack_mm" in names) == few


def test_gradients_go_through_codes():
    inputs = torch.ones(1, 16, dtype=torch.bfloat16, requires_grad=True)
    codes, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16)
    apply_codes(inputs, codes, scale).sum().backward()
    assert inputs.grad.tolist() == [[4.0] * 16]


def test_columns_stay_columns_between_products():
    inputs, weight = torch.ones(1, 3, 6), torch.ones(4, 6)
    with torch.no_grad():
        found = apply_weight(inputs, weight, is_between=True)
        assert found.shape == (1, 3, 4)
        assert found.stride() == (3, 1, 3)
        assert apply_weight(found, weight[:, :4]).is_contiguous()


@pytest.mark.parametrize("codes_at", [0, 1, 8, 16])
@pytest.mark.parametrize("inputs_at", [0, 1, 8, 16])
def test_codes_and_inputs_may_begin_anywhere(codes_at, inputs_at):
    # the kernel ends the process where they do not begin at multiples of what it reads at once
    codes = torch.zeros(4 * 32 + 64, dtype=torch.int8)[codes_at : codes_at + 4 * 32].view(4, 32)
    codes.copy_(torch.arange(-64, 64).view(4, 32))
    inputs = torch.zeros(2 * 32 + 64, dtype=torch.bfloat16)[inputs_at : inputs_at + 64].view(2, 32)
    inputs.fill_(1)
    with torch.no_grad():
        found = apply_codes(inputs, codes, torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(found.double(), codes.double().sum(1).expand(2, 4).bfloat16().double())


def test_codes_work_inside_vmap():
    codes, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16)
    inputs = torch.ones(3, 2, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        found = torch.vmap(lambda rows: apply_codes(rows, codes, scale))(inputs)
    assert torch.equal(found, torch.full((3, 2, 4), 16, dtype=torch.bfloat16))
