"""Gains against Jacobians that are written down, or formed in full; and what is left behind."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from slimrank import TokenWindows
from slimrank.calibration import embed_batches, output_sensitivity
from slimrank.errors import NumericalError
from slimrank.model import discover
from tolerances import TOLERANCE

ALONE = ((), {})
EXACT = TOLERANCE["forward", torch.float64]
DEVIATIONS = 6  # of the estimate from what it estimates; seeds are fixed


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(out_features, in_features, seed):
    module = nn.Linear(in_features, out_features).double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=drawn(seed), dtype=torch.float64)
    return module


def states(batch=2, length=5, hidden=6, seed=9):
    return torch.randn(batch, length, hidden, generator=drawn(seed), dtype=torch.float64)


def probes_of(shape, count, seed=0):
    """What is drawn at the block's output, by the same generator."""
    generator = drawn(seed)
    return [torch.randn(shape, generator=generator).double() for _ in range(count)]


def full_jacobian(block, module, inputs, call, width):
    """From the outputs of a linear, of all tokens, to the block's output."""
    args, kwargs = call

    def moved(shift):
        handle = module.register_forward_hook(lambda _m, _a, output: output + shift)
        output = block(inputs, *args, **kwargs)
        handle.remove()
        return output[0] if isinstance(output, tuple) else output

    found = jacobian(moved, torch.zeros(*inputs.shape[:2], width, dtype=inputs.dtype))
    size = inputs.shape[0] * inputs.shape[1] * width
    return found.reshape(-1, size).double()


class Residual(nn.Module):
    """Adds what two linears with a bend between them make of its input, as a tuple."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = linear(4, 6, 1), linear(6, 4, 2)

    def forward(self, hidden_states, scale=1.0):
        return hidden_states + scale * self.outer(torch.tanh(self.inner(hidden_states))), None


# written down


def test_one_linear_gives_its_errors_on_as_they_are():
    """J is the identity: the estimate is the mean square of the probe."""
    block = linear(7, 6, 0)
    gains = output_sensitivity(block, {"it": block}, states(), ALONE, drawn(), probes=3)
    expected = torch.stack(probes_of((2, 5, 7), 3)).square().mean()
    assert gains == {"it": pytest.approx(float(expected), rel=EXACT)}
    assert abs(gains["it"] - 1) < DEVIATIONS * math.sqrt(2 / (3 * 10 * 7))


def test_a_chain_of_two():
    """J of the first is the second's weight, at each token: the gain is its energy per input."""
    block = nn.Sequential(linear(4, 6, 1), linear(7, 4, 2))
    named, count = {"first": block[0], "second": block[1]}, 50
    gains = output_sensitivity(block, named, states(), ALONE, drawn(), probes=count)
    weight, probes = block[1].weight.detach(), probes_of((2, 5, 7), count)
    pulled = sum(float((v @ weight).square().sum()) for v in probes) / (count * 10 * 4)
    assert list(gains) == ["first", "second"]
    assert gains["first"] == pytest.approx(pulled, rel=EXACT)
    exact = float(weight.square().sum()) / 4
    spread = math.sqrt(2 * 10 * float((weight @ weight.mT).square().sum()) / count) / (10 * 4)
    assert abs(gains["first"] - exact) < DEVIATIONS * spread
    assert abs(gains["second"] - 1) < DEVIATIONS * math.sqrt(2 / (count * 10 * 7))


@pytest.mark.parametrize("length", [1, 3, 9])
def test_it_does_not_grow_with_tokens(length):
    block = nn.Sequential(linear(4, 6, 1), nn.Linear(4, 4, bias=False).double())
    block[1].weight.data = 3 * torch.eye(4, dtype=torch.float64)
    named = {"first": block[0], "second": block[1]}
    gains = output_sensitivity(block, named, states(2, length), ALONE, drawn(3))
    assert gains["first"] / gains["second"] == pytest.approx(9, rel=EXACT)
    assert abs(gains["second"] - 1) < DEVIATIONS * math.sqrt(2 / (4 * 2 * length * 4))


def test_a_linear_that_runs_twice_counts_both_times():
    """y = W W x: an error of the second run stays as it is, one of the first goes through W."""
    shared = nn.Linear(6, 6, bias=False).double()
    shared.weight.data = 2 * torch.eye(6, dtype=torch.float64)
    gains = output_sensitivity(
        nn.Sequential(shared, shared), {"it": shared}, states(), ALONE, drawn()
    )
    expected = 5 * torch.stack(probes_of((2, 5, 6), 4)).square().mean()
    assert gains["it"] == pytest.approx(float(expected), rel=EXACT)


def test_what_is_changed_in_place_counts_as_it_was():
    """The outputs are halved in place, so the place where they are measured is before that."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.it = linear(6, 6, 1)

        def forward(self, hidden_states):
            return self.it(hidden_states).mul_(0.5)

    block = Halved()
    gains = output_sensitivity(block, {"it": block.it}, states(), ALONE, drawn())
    expected = torch.stack(probes_of((2, 5, 6), 4)).square().mean() / 4
    assert gains["it"] == pytest.approx(float(expected), rel=EXACT)


# formed in full


def close_to_jacobian(estimate, found, tokens, width, probes):
    """Within the spread of the estimate: its variance is ``2 ‖J Jᵀ‖² / probes``."""
    exact = float(found.square().sum()) / (tokens * width)
    spread = math.sqrt(2 * float((found @ found.mT).square().sum()) / probes) / (tokens * width)
    return abs(estimate - exact) < DEVIATIONS * spread < exact


@pytest.mark.parametrize("call", [ALONE, ((2.0,), {}), ((), {"scale": 0.1})])
def test_a_residual_block(call):
    block, inputs, count = Residual(), states(), 40
    named = {"inner": block.inner, "outer": block.outer}
    gains = output_sensitivity(block, named, inputs, call, drawn(4), count)
    for name, width in {"inner": 4, "outer": 6}.items():
        found = full_jacobian(block, named[name], inputs, call, width)
        assert close_to_jacobian(gains[name], found, 10, width, count)


def prepared(model, windows):
    """First block of a model, its linears by name, its inputs and its call."""
    anatomy = discover(model, torch.arange(12)[None])
    batch = embed_batches(model, anatomy, windows, 2)[0]
    block = next(iter(model.get_submodule(anatomy.path).children()))
    named = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    return block, named, batch.hidden, batch.calls[0]


@pytest.fixture(scope="module")
def short(windows):
    return TokenWindows(tuple(window[:5] for window in windows.windows[:3]))


@pytest.mark.parametrize("family", ["llama", "falcon"])  # falcon adds to an output in place
def test_a_block_with_attention(family, make_model, short):
    block, named, inputs, call = prepared(make_model(family, dtype=torch.float64), short)
    count = 30
    gains = output_sensitivity(block, named, inputs, call, drawn(), count)
    assert list(gains) == list(named)
    for name, module in named.items():
        width = module.out_features
        found = full_jacobian(block, module, inputs, call, width)
        assert close_to_jacobian(gains[name], found, inputs.shape[0] * 5, width, count)


def test_it_foretells_the_error_of_the_block(make_model, short):
    """Small white errors at one linear, and what becomes of them, per token."""
    block, named, inputs, call = prepared(make_model("llama", dtype=torch.float64), short)
    gains = output_sensitivity(block, named, inputs, call, drawn(), 200)
    args, kwargs = call
    generator, size = drawn(1), 1e-5
    for name, module in named.items():
        errors = []
        for _ in range(200):
            shape = (*inputs.shape[:2], module.out_features)
            white = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                before = block(inputs, *args, **kwargs)
                handle = module.register_forward_hook(lambda _m, _a, y, white=white: y + white)
                after = block(inputs, *args, **kwargs)
                handle.remove()
            errors.append((after - before).square().sum(-1).mean())
        seen = float(torch.stack(errors).mean())
        # both sides are means of 200 draws, with a relative spread of a few percent
        assert seen == pytest.approx(gains[name] * size**2 * module.out_features, rel=0.2)


# experts


@pytest.mark.filterwarnings("ignore::slimrank.errors.CoverageWarning")
def test_an_expert_without_tokens(make_experts_model, short):
    model = make_experts_model(experts=4, top=2, closed=(1,))
    block, named, inputs, call = prepared(model, short)
    gains = output_sensitivity(block, named, inputs, call, drawn())
    closed = {name for name in named if ".1." in name}
    assert len(closed) == 3
    assert {name for name, gain in gains.items() if gain == 0.0} == closed
    assert list(gains) == list(named)


def test_an_expert_counts_by_its_share_of_the_tokens():
    """Of ten tokens it sees the four of positions 0 and 1, and gives them on as they are."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = linear(6, 6, 1)

        def forward(self, hidden_states):
            seen = self.expert(hidden_states[:, :2])
            return torch.cat([seen, hidden_states[:, 2:]], dim=1)

    block = Routed()
    gains = output_sensitivity(block, {"it": block.expert}, states(), ALONE, drawn())
    probes = torch.stack(probes_of((2, 5, 6), 4))[:, :, :2]
    assert gains["it"] == pytest.approx(0.4 * float(probes.square().mean()), rel=EXACT)


def test_outputs_that_go_nowhere():
    """One is thrown away, and one stands beside the hidden states and needs none of them."""

    class Wasteful(Residual):
        def __init__(self):
            super().__init__()
            self.extra, self.constant = linear(3, 6, 5), linear(6, 2, 6)

        def forward(self, hidden_states):
            self.extra(hidden_states)
            gate = self.constant(torch.ones(2, dtype=torch.float64))
            return super().forward(hidden_states)[0] + gate

    block = Wasteful().requires_grad_(False)
    named = {"extra": block.extra, "constant": block.constant}
    gains = output_sensitivity(block, named, states(), ALONE, drawn())
    assert gains["extra"] == 0.0
    pulled = [v.sum((0, 1)).square().sum() for v in probes_of((2, 5, 6), 4)]
    assert gains["constant"] == pytest.approx(float(sum(pulled)) / (4 * 10 * 6), rel=EXACT)


def test_no_linear_is_asked_for():
    assert output_sensitivity(Residual(), {}, states(), ALONE, drawn()) == {}


# what is left behind


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_nothing_is_left_behind(make_model, short, trains, outer):
    block, named, inputs, call = prepared(make_model("llama").requires_grad_(trains), short)
    own = named["mlp.down_proj"].register_forward_hook(lambda *_: None)
    weights = {name: p.clone() for name, p in block.named_parameters()}
    before = inputs.clone()
    with outer():
        enabled = torch.is_grad_enabled()
        output_sensitivity(block, named, inputs, call, drawn())
        assert torch.is_grad_enabled() == enabled
    assert not inputs.requires_grad
    assert torch.equal(inputs, before)
    for name, parameter in block.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == trains
        assert torch.equal(parameter, weights[name])
    hooks = [list(m._forward_hooks) for m in block.modules() if m._forward_hooks]
    assert hooks == [[own.id]]
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_hooks_are_removed_when_the_block_fails():
    block = Residual()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        output_sensitivity(block, {"inner": block.inner}, states(hidden=5), ALONE, drawn())
    assert not block.inner._forward_hooks


def test_the_generator_decides(make_model, short):
    prepared_block = prepared(make_model("llama"), short)
    first, again, other = (output_sensitivity(*prepared_block, drawn(seed)) for seed in (1, 1, 2))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_half_precision_is_close(make_model, short):
    """The same probes, so they differ by the rounding of a forward and a backward pass."""
    gains = [
        output_sensitivity(*prepared(make_model("llama", dtype=dtype), short), drawn())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    bound = 2 * TOLERANCE["forward", torch.bfloat16]
    assert gains[1] == {name: pytest.approx(gain, rel=bound) for name, gain in gains[0].items()}


def test_a_gain_that_is_not_finite_is_named():
    """What is not a number lies behind `inner`, and nothing does behind `outer`."""
    block = Residual()
    block.outer.weight.data[0, 0] = math.nan
    named = {"outer": block.outer, "inner": block.inner}
    with pytest.raises(NumericalError, match=r"^inner: the gain from its outputs"):
        output_sensitivity(block, named, states(), ALONE, drawn())


@pytest.mark.parametrize("probes", [0, -1])
def test_no_probes(probes):
    with pytest.raises(ValueError, match=f"at least one probe is needed, not {probes}"):
        output_sensitivity(Residual(), {}, states(), ALONE, drawn(), probes)
