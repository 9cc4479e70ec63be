"""What is special to the pivoted layout of a `LowRankLinear`."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from slimrank.errors import CheckpointError
from slimrank.linalg import Factors, decompose_outputs
from slimrank.nn import LowRankLinear, check_pivots
from slimrank.nn import row_placement as placement_module
from slimrank.nn.row_placement import RowNumbers, place_rows

OUT, INNER, RANK = 9, 8, 4


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def int32(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def made(seed=1, rank=RANK, bias=True) -> tuple[Factors, LowRankLinear]:
    """A layer, and the factors that it has, whatever is done to it."""
    linear = nn.Linear(INNER, OUT, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(seed, OUT, INNER))
        if bias:
            linear.bias.copy_(normal(seed + 1, OUT))
    factors = decompose_outputs(linear.weight.detach()).truncate(rank)
    return factors, LowRankLinear.from_factors(linear, factors, pivoted=True)


def assert_computes(layer: nn.Module, factors: Factors, bias: torch.Tensor | None, tolerance=1e-12):
    dtype = layer.latent.weight.dtype
    inputs = normal(9, 3, INNER).to(dtype)
    expected = inputs.double() @ factors.dense().mT + (0 if bias is None else bias.double())
    torch.testing.assert_close(layer(inputs).double(), expected, rtol=0, atol=tolerance)


def test_keys_shapes_and_layout():
    _, layer = made()
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "latent.weight": (RANK, INNER),
        "expand.weight": (OUT - RANK, RANK),
        "bias": (OUT,),
        "weight": (0,),
        "pivots": (RANK,),
    }
    assert layer.pivots.dtype == torch.int32
    assert {name for name, _ in layer.named_parameters()} == {
        "latent.weight",
        "expand.weight",
        "bias",
    }
    assert "rank=4, bias=True, pivoted=True" in repr(layer)
    assert not hasattr(LowRankLinear(INNER, OUT, RANK), "pivots")


def test_the_latents_are_outputs():
    _, layer = made(bias=False)
    inputs = normal(3, 5, INNER)
    assert torch.equal(layer(inputs)[:, layer.pivots.long()], layer.latent(inputs))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (1, 2), (0,), (3, 0)])
def test_one_token_or_many_with_or_without_gradients(shape):
    factors, layer = made(seed=20)
    inputs = normal(9, *shape, INNER)
    expected = inputs @ factors.dense().mT + layer.bias
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-12)


def test_pivots_are_any_rows_in_any_order():
    layer = LowRankLinear(2, 5, rank=2, bias=False, pivoted=True)
    layer.pivots = int32(3, 1)
    with torch.no_grad():
        layer.latent.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.expand.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
    expected = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    assert torch.equal(layer.to_linear().weight, expected)
    assert torch.equal(layer.factors().left @ layer.factors().right, expected)
    assert layer(torch.tensor([5.0, 7.0])).tolist() == [12.0, 7.0, 10.0, 5.0, 21.0]


@pytest.mark.parametrize("rank", [1, INNER])
def test_its_factors_are_the_product(rank):
    factors, layer = made(rank=rank)
    torch.testing.assert_close(layer.factors().dense(), factors.dense(), rtol=0, atol=1e-12)
    assert not layer.factors().left.requires_grad
    assert layer.expansion().requires_grad
    assert_computes(layer, factors, layer.bias)


def test_every_row_may_be_a_pivot():
    linear = nn.Linear(12, OUT, dtype=torch.float64)
    factors = Factors(normal(1, OUT, OUT), normal(2, OUT, 12))
    layer = LowRankLinear.from_factors(linear, factors, pivoted=True)
    assert layer.expand.weight.shape == (0, OUT)
    inputs = normal(3, 4, 12).requires_grad_()
    expected = inputs @ factors.dense().mT + linear.bias
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-11)
    layer(inputs).sum().backward()
    assert layer.latent.weight.grad is not None


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_gradients_are_those_of_the_dense_product(batch):
    _, layer = made()
    inputs, downstream = normal(5, *batch, INNER).requires_grad_(), normal(6, *batch, OUT)
    parameters = [inputs, *layer.parameters()]
    found = torch.autograd.grad(layer(inputs), parameters, downstream)
    outputs = inputs @ layer.latent.weight.mT @ layer.expansion().mT + layer.bias
    expected = torch.autograd.grad(outputs, parameters, downstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients_of_gradients():
    rows = RowNumbers().of(int32(2, 0), 3)
    latents, others = normal(1, 3, 2).requires_grad_(), normal(2, 3, 1).requires_grad_()

    def placed(latents, others):
        return place_rows(latents, others, rows).square()

    assert torch.autograd.gradcheck(placed, (latents, others))
    assert torch.autograd.gradgradcheck(placed, (latents, others))


# the rows that follow from pivots are never those of other pivots


def test_after_construction():
    layer = LowRankLinear(INNER, OUT, RANK, pivoted=True, dtype=torch.float64)
    assert layer.pivots.tolist() == list(range(RANK))
    assert_computes(layer, layer.factors(), layer.bias)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("start", ["cpu", "meta"])
def test_after_a_state_dict(assign, warm, start):
    if start == "meta" and not assign:
        pytest.skip("nothing is copied into a tensor on meta")
    factors, layer = made(seed=20)
    assert layer.pivots.tolist() != list(range(RANK))
    other = LowRankLinear(INNER, OUT, RANK, pivoted=True, dtype=torch.float64, device=start)
    if warm:
        other(torch.ones(INNER, dtype=torch.float64, device=start))
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert_computes(other, factors, layer.bias)


class Tiny(PreTrainedModel):
    """A model of one pivoted layer."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.proj = LowRankLinear(INNER, OUT, RANK, pivoted=True)
        self.post_init()

    def _init_weights(self, module):
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_after_from_pretrained(tmp_path, dtype):
    factors, layer = made(seed=20)
    model = Tiny(PretrainedConfig())
    model.proj = layer
    model.save_pretrained(tmp_path)
    loaded, found = Tiny.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert loaded.proj.pivots.dtype == torch.int32
    assert loaded.proj.latent.weight.dtype == dtype
    assert_computes(loaded.proj, factors, layer.bias, 1e-12 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize(
    ("cast", "tolerance"),
    [
        (lambda layer: layer.half(), 2e-2),
        (lambda layer: layer.bfloat16(), 2e-1),
        (lambda layer: layer.float(), 1e-5),
        (lambda layer: layer.to(torch.float32), 1e-5),
        (lambda layer: layer.to("cpu"), 1e-12),
        (copy.deepcopy, 1e-12),
    ],
)
def test_after_casts_moves_and_copies(cast, tolerance):
    factors, layer = made(seed=20)
    bias = layer.bias.detach().clone()
    for warm in (False, True):
        if warm:
            layer(torch.ones(INNER, dtype=layer.latent.weight.dtype))
        found = cast(layer)
        assert found.pivots.dtype == torch.int32
        assert_computes(found, factors, bias, tolerance)


def test_on_meta_and_back():
    factors, layer = made(seed=20)
    state, skeleton = layer.state_dict(), copy.deepcopy(layer).to("meta")
    assert skeleton(torch.ones(2, INNER, dtype=torch.float64, device="meta")).shape == (2, OUT)
    skeleton.to_empty(device="cpu").load_state_dict(state)
    assert_computes(skeleton, factors, layer.bias)


def test_after_pivots_are_assigned_or_written_to():
    (factors, layer), (others, other) = made(seed=20), made(seed=30)
    assert layer.pivots.tolist() != other.pivots.tolist()
    for write in ("assign", "copy"):
        subject = copy.deepcopy(layer)
        assert_computes(subject, factors, layer.bias)
        with torch.no_grad():
            for mine, new in zip(subject.parameters(), other.parameters(), strict=True):
                mine.copy_(new)
            if write == "assign":
                subject.pivots = other.pivots
            else:
                subject.pivots.copy_(other.pivots)
        twin = copy.deepcopy(subject)  # before it has looked at its pivots again
        assert_computes(twin, others, other.bias)
        assert_computes(subject, others, other.bias)


def test_functional_call_with_other_pivots():
    (_, layer), (others, other) = made(seed=20), made(seed=30)
    inputs = normal(9, 3, INNER)
    before = layer(inputs)
    found = torch.func.functional_call(layer, other.state_dict(), inputs)
    torch.testing.assert_close(found, inputs @ others.dense().mT + other.bias, rtol=0, atol=1e-12)
    assert torch.equal(layer(inputs), before)


def test_inference_mode_first_and_training_after():
    factors, layer = made(seed=20)
    with torch.inference_mode():
        assert_computes(layer, factors, layer.bias)
        inside = copy.deepcopy(layer)
        assert inside.pivots.is_inference()
        assert_computes(inside, factors, layer.bias)
    layer(normal(1, 2, INNER)).sum().backward()
    assert layer.expand.weight.grad is not None
    with torch.no_grad():
        assert_computes(inside, factors, layer.bias)


def test_rows_are_derived_once(monkeypatch):
    _, layer = made()
    layer(normal(1, 2, INNER))
    monkeypatch.setattr(placement_module, "other_rows", None)
    layer(normal(1, 2, INNER))
    shadow = copy.copy(layer)  # the latent cache's: it shares what the live layer knows
    shadow(normal(1, 2, INNER))
    with pytest.raises(TypeError, match="not callable"):
        copy.deepcopy(layer)(normal(1, 2, INNER))


def test_threads_with_pivots_of_their_own():
    rows, asked = RowNumbers(), [(int32(0, 1), [2, 3, 4, 5]), (int32(5, 2), [0, 1, 3, 4])]

    def ask(number):
        pivots, expected = asked[number % 2]
        return rows.of(pivots, 6).others.tolist() == expected

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(2000)))


def test_compiled_layers_are_one_graph_and_follow_their_pivots():
    script = Path(__file__).with_name("compiled_layer.py")
    done = subprocess.run(
        [sys.executable, script, "aot_eager"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_it_can_be_exported():
    factors, layer = made(seed=20)
    inputs = normal(9, 3, INNER)
    for _ in range(2):
        program = torch.export.export(layer, (inputs,))
        found = program.module()(inputs)
        expected = inputs @ factors.dense().mT + layer.bias
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        layer(inputs)


# pivots that lie

HOSTILE = [
    (int32(0, 1, 2, OUT), f"row {OUT} of {OUT}"),
    (int32(0, -1, 2, 3), f"row -1 of {OUT}"),
    (int32(5, 1, 2, 5), "row 5 twice"),
    (torch.tensor([0, 1, 2, 3]), r"torch\.int64, not torch\.int32"),
    (torch.tensor([0.0, 1.0, 2.0, 3.0]), r"torch\.float32, not torch\.int32"),
]


@pytest.mark.parametrize(("pivots", "text"), HOSTILE)
def test_hostile_pivots_are_refused_wherever_they_come_in(pivots, text):
    _, layer = made()
    with pytest.raises(CheckpointError, match=text):
        check_pivots(pivots, OUT, "model.o_proj")
    for assign in (False, True):
        parent = nn.ModuleDict({"o_proj": copy.deepcopy(layer)})
        state = parent.state_dict() | {"o_proj.pivots": pivots}
        with pytest.raises(CheckpointError, match=rf"pivots of o_proj .*{text}"):
            parent.load_state_dict(state, assign=assign)
    layer.pivots = pivots
    with pytest.raises(CheckpointError, match=text):
        layer(normal(1, 2, INNER))


def test_good_pivots_pass_the_check():
    check_pivots(int32(8, 0, 3), OUT)
    check_pivots(int32(), OUT)


def test_a_state_of_the_other_layout_is_refused():
    plain = LowRankLinear(INNER, OUT, RANK)
    pivoted = LowRankLinear(INNER, OUT, RANK, pivoted=True)
    with pytest.raises(RuntimeError, match="size mismatch for expand"):
        plain.load_state_dict(pivoted.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        pivoted.load_state_dict(plain.state_dict())
