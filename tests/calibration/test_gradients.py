"""Block by block gives what one backward through the whole model gives, for every family."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from slimrank import TokenWindows
from slimrank.calibration import ActivationStore, collect_gradients, head, keep_gradients
from slimrank.calibration.labels import Labels
from slimrank.errors import ModelError, NumericalError, TextError
from slimrank.model import discover
from tolerances import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
EXACT = 10 * TOLERANCE["forward", torch.float64]  # a forward and a backward, each entry
LENGTHS = (9, 24, 9, 24, 24)


def drawn(lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return TokenWindows(
        tuple(torch.randint(4, 96, (length,), generator=generator) for length in lengths)
    )


def anatomy_of(model):
    return discover(model, torch.arange(12)[None])


def collected(model, windows, anatomy=None, batch_size=3, store=None, **options):
    """What is yielded, from the first block to the last."""
    store = ActivationStore() if store is None else store
    anatomy = anatomy_of(model) if anatomy is None else anatomy
    found = collect_gradients(
        model, anatomy, windows, batch_size=batch_size, store=store, **options
    )
    return list(found)[::-1]


def merged(found, field="metrics"):
    return {name: value for block in found for name, value in getattr(block, field).items()}


def probed(probes, key):
    """A hook that adds zeros to an output, by which it can be differentiated."""

    def hook(_m, _a, output):
        states = output[0] if isinstance(output, tuple) else output
        probe = torch.zeros_like(states, requires_grad=True)
        probes.append((key, probe))
        shifted = states + probe
        return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

    return hook


def whole_backward(model, windows, anatomy, labels=None):
    """Metrics by linear's name or block's number, row weights, mean gradients; plain autograd."""
    names = [site.name for site in anatomy.sites]
    blocks = list(model.get_submodule(anatomy.path).children())
    watched = {name: model.get_submodule(name) for name in names} | dict(enumerate(blocks))
    sums, rows, tokens = dict.fromkeys(watched, 0.0), dict.fromkeys(names, 0.0), 0
    means = {name: torch.zeros_like(model.get_submodule(name).weight) for name in names}
    for number, window in enumerate(windows.windows):
        probes = []
        with ExitStack() as stack:
            for key, module in watched.items():
                stack.callback(module.register_forward_hook(probed(probes, key)).remove)
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        wanted = window[1:] if labels is None else labels.at(number, 0, logits.detach())
        loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        weights = [model.get_submodule(name).weight for name in names]
        sources = [*(probe for _, probe in probes), *weights]
        found = torch.autograd.grad(loss, sources, allow_unused=True)
        for (key, probe), pulled in zip(probes, found, strict=False):
            flat = (torch.zeros_like(probe) if pulled is None else pulled).reshape(
                -1, probe.shape[-1]
            )
            sums[key] = sums[key] + flat.mT @ flat
        for name, pulled in zip(names, found[len(probes) :], strict=True):
            if pulled is not None:
                rows[name] = rows[name] + (pulled / len(wanted)).square().sum(1)
                means[name] = means[name] + pulled
        tokens += len(wanted)
    metrics = {key: torch.as_tensor(total) / tokens for key, total in sums.items()}
    rows = {k: torch.as_tensor(v) / len(windows.windows) for k, v in rows.items()}
    return metrics, rows, {name: mean.detach() / tokens for name, mean in means.items()}


def assert_close(found, wanted, bound=EXACT):
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= bound * wanted.double().norm()
    assert wanted.norm() > 0


def assert_same(found, wanted, bound=EXACT):
    """All metrics of two runs."""
    assert [block.index for block in found] == [block.index for block in wanted]
    for left, right in zip(found, wanted, strict=True):
        assert_close(left.output_metric, right.output_metric, bound)
        assert left.metrics.keys() == right.metrics.keys()
        for name, metric in left.metrics.items():
            assert_close(metric, right.metrics[name], bound)


def assert_whole(model, windows, found, anatomy, labels=None, bound=EXACT):
    """Held against plain autograd."""
    metrics, rows, means = whole_backward(model, windows, anatomy, labels)
    names = {site.name for site in anatomy.sites}
    assert merged(found).keys() == names
    for name, metric in merged(found).items():
        assert_close(metric, metrics[name], bound)
        assert torch.equal(metric, metric.mT)
    for block in found:
        assert_close(block.output_metric, metrics[block.index], bound)
    given = merged(found, "row_weights")
    assert given.keys() in (set(), names)
    for name, weights in given.items():
        assert_close(weights, rows[name], bound)
    given = merged(found, "mean_gradients")
    assert given.keys() in (set(), names)
    for name, gradient in given.items():
        assert_close(gradient, means[name], bound)


# against the whole model


@pytest.mark.parametrize("weight_gradients", [False, True])
def test_it_equals_one_backward_through_the_model(family, make_model, tiny, weight_gradients):
    dtype = torch.float32 if family in tiny.FUSED else torch.float64  # torch's grouped product
    model, windows = make_model(family, dtype=dtype), drawn()
    anatomy = anatomy_of(model)
    found = collected(model, windows, weight_gradients=weight_gradients)
    assert bool(merged(found, "row_weights")) == weight_gradients
    assert_whole(model, windows, found, anatomy, bound=10 * TOLERANCE["forward", dtype])


def test_mean_gradients_equal_those_of_one_backward(family, make_model, tiny):
    dtype = torch.float32 if family in tiny.FUSED else torch.float64
    model, windows = make_model(family, dtype=dtype), drawn()
    found = collected(model, windows, mean_gradients=True)
    assert merged(found, "mean_gradients")
    assert not merged(found, "row_weights")
    bound = 10 * TOLERANCE["forward", dtype]
    assert_whole(model, windows, found, anatomy_of(model), bound=bound)


@pytest.mark.parametrize("weight_gradients", [False, True])
def test_experts_that_see_some_tokens(make_experts_model, weight_gradients):
    model = make_experts_model(experts=4, top=2).double()
    windows, anatomy = drawn(), anatomy_of(model)
    found = collected(model, windows, weight_gradients=weight_gradients, mean_gradients=True)
    assert_whole(model, windows, found, anatomy)


@pytest.mark.filterwarnings("ignore::slimrank.errors.CoverageWarning")
def test_an_expert_without_tokens_has_no_metric(make_experts_model):
    model = make_experts_model(experts=4, top=2, closed=(1,)).double()
    found = collected(model, drawn(), weight_gradients=True, mean_gradients=True)
    for field in ("metrics", "row_weights", "mean_gradients"):
        for name, value in merged(found, field).items():
            assert (value.norm() == 0) == (".experts.1." in name)


class Twice(nn.Module):
    """An MLP that runs its one linear twice; it may change that one's input and output in place."""

    def __init__(self, hidden):
        super().__init__()
        self.it, self.in_place = nn.Linear(hidden, hidden), True

    def forward(self, states):
        first = self.it(states)
        if self.in_place:
            states.zero_()
        return self.it(torch.tanh(first.mul_(0.7) if self.in_place else 0.7 * first))


@pytest.mark.parametrize("weight_gradients", [False, True])
def test_a_linear_that_runs_twice_counts_both_times(make_model, tiny, weight_gradients):
    model, mlp = make_model("llama"), Twice(32)
    model.model.layers[0].mlp = mlp
    tiny.fill(model)
    model.double().requires_grad_(False)  # with gradients, autograd refuses the change of an input
    windows, anatomy = drawn(), anatomy_of(model)
    assert "model.layers.0.mlp.it" in [site.name for site in anatomy.sites]
    found = collected(model, windows, weight_gradients=weight_gradients, mean_gradients=True)
    model.requires_grad_(True)
    mlp.in_place = False
    assert_whole(model, windows, found, anatomy)


@pytest.mark.parametrize("chunk", [1, 5, 23])
def test_logits_in_parts(make_model, monkeypatch, chunk):
    model, windows = make_model("gemma2", dtype=torch.float64), drawn((24, 9))
    whole = collected(model, windows)
    monkeypatch.setattr(head, "CHUNK", chunk)
    assert_same(collected(model, windows), whole)


def test_the_last_position_adds_nothing(make_model):
    """Its token is a label, never an input that matters."""
    model, windows = make_model("llama", dtype=torch.float64), drawn((9,))
    longer = collected(model, windows)
    logits = model(input_ids=windows.windows[0][None]).logits
    assert logits.shape[1] == 9
    rank = torch.linalg.matrix_rank(longer[-1].output_metric, hermitian=True)
    assert rank == 8


def test_some_linears_only(make_model):
    model, windows = make_model("llama", dtype=torch.float64), drawn((9, 9))
    whole, name = collected(model, windows), "model.layers.1.mlp.up_proj"
    found = collected(model, windows, anatomy_of(model).only([name]))
    assert list(merged(found)) == [name]
    assert_close(merged(found)[name], merged(whole)[name])
    for some, every in zip(found, whole, strict=True):
        assert_close(some.output_metric, every.output_metric)


# grouping, order, storage


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_grouping_and_order_are_immaterial(make_model, batch_size):
    model, windows = make_model("qwen3", dtype=torch.float64), drawn()
    wanted = collected(model, windows)
    turned = TokenWindows(windows.windows[::-1])
    assert_same(collected(model, turned, batch_size=batch_size), wanted)


def test_what_is_on_disk_is_the_same(make_model, tmp_path):
    model, windows = make_model("llama"), drawn()
    with ActivationStore(limit=0, folder=tmp_path) as store:
        found = collected(model, windows, store=store)
        assert (store.bytes_in_memory, store.bytes_on_disk) == (0, 0)
    assert_same(found, collected(model, windows), bound=0)


def test_blocks_come_last_first_and_may_be_changed(make_model):
    model, windows = make_model("llama", dtype=torch.float64), drawn()
    wanted, store, found = collected(model, windows), ActivationStore(), []
    for block in collect_gradients(model, anatomy_of(model), windows, batch_size=2, store=store):
        found.append(block)
        for parameter in model.model.layers[block.index].parameters():
            parameter.data.zero_()
    assert [block.index for block in found] == [1, 0]
    assert_same(found[::-1], wanted)


def test_they_can_be_kept(make_model):
    model, windows = make_model("llama"), drawn((9,))
    found = collected(model, windows, weight_gradients=True, mean_gradients=True)
    with ActivationStore() as store:
        keep_gradients(found, store)
        for block in found:
            assert torch.equal(store.get(("output_metric", block.index)), block.output_metric)
            for name, metric in block.metrics.items():
                assert torch.equal(store.get(("metric", name)), metric)
                assert torch.equal(store.get(("row_weights", name)), block.row_weights[name])
                assert torch.equal(store.get(("mean_gradient", name)), block.mean_gradients[name])


# labels


def test_labels_of_the_model(make_model):
    model, windows = make_model("llama", dtype=torch.float64), drawn()
    generator = torch.Generator().manual_seed(5)
    found = collected(model, windows, labels="model", generator=generator)
    labels = Labels.drawn(windows, torch.Generator().manual_seed(5))
    assert_whole(model, windows, found, anatomy_of(model), labels)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_labels_of_the_model_are_settled_by_the_generator(make_model, batch_size):
    model, windows = make_model("llama", dtype=torch.float64), drawn()

    def run(seed, size):
        generator = torch.Generator().manual_seed(seed)
        return collected(model, windows, batch_size=size, labels="model", generator=generator)

    assert_same(run(0, batch_size), run(0, 3))
    first, other = run(0, 3)[0].output_metric, run(1, 3)[0].output_metric
    assert (first - other).norm() > 0.01 * first.norm()


def test_a_generator_does_not_matter_for_labels_of_the_text(make_model):
    model, windows = make_model("llama"), drawn((9,))
    given = collected(model, windows, generator=torch.Generator())
    assert_same(given, collected(model, windows), bound=0)


# dtypes


def test_metrics_in_float32(make_model):
    model, windows = make_model("llama"), drawn((9, 9))
    found = collected(model, windows, dtype=torch.float32)
    assert {m.dtype for m in merged(found).values()} == {torch.float32}
    assert_same(found, collected(model, windows), TOLERANCE["forward", torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_model, dtype):
    """Each of the roundings on the way is a forward's; a square has the error twice."""
    model, windows = make_model("llama", dtype=dtype), drawn()
    exact = make_model("llama", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    assert_same(
        collected(model, windows), collected(exact, windows), 4 * TOLERANCE["forward", dtype]
    )


def test_tiny_gradients_in_float16(make_model):
    """Unscaled, they would be under the smallest number of float16."""
    model, windows = make_model("llama", dtype=torch.float16), drawn()
    model.lm_head.weight.data *= 2.0**-6
    model.model.norm.weight.data *= 2.0**-10
    exact = make_model("llama", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    wanted = collected(exact, windows)
    # a typical entry of the gradient, against the smallest that float16 tells from zero
    assert wanted[0].output_metric.diagonal().mean().sqrt() < 64 * 2.0**-24
    bound = 4 * TOLERANCE["forward", torch.float16]
    assert_same(collected(model, windows), wanted, bound)


# what is left behind, and what goes wrong


def test_the_model_is_left_as_it_was(make_model):
    model = make_model("falcon")
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    store = ActivationStore()
    with torch.no_grad():
        found = collected(model, drawn(), store=store, weight_gradients=True)
        assert not torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen)
        assert torch.equal(parameter, before[name])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert not model.training
    assert store.bytes_in_memory == 0
    assert not any(value.requires_grad for value in merged(found).values())


@pytest.mark.parametrize("length", [1, 0])
def test_a_window_that_predicts_nothing_is_refused(make_model, length):
    windows = (torch.arange(4, 13), torch.arange(length))
    with pytest.raises(TextError, match=r"at least 2 tokens|is empty"):
        collected(make_model("llama"), TokenWindows(windows))


def test_labels_need_a_generator(make_model):
    with pytest.raises(ValueError, match="need a generator"):
        collected(make_model("llama"), drawn(), labels="model")


def test_a_model_that_cannot_be_replayed_is_refused(make_model):
    model = make_model("llama")
    anatomy = anatomy_of(model)
    model.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match="passes more than hidden states"):
        collected(model, drawn(), anatomy)


def test_a_loss_that_is_not_finite(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="loss of a calibration window is nan"):
        collected(model, drawn())


class Spoilt(torch.autograd.Function):
    """Right forwards, NaN backwards."""

    @staticmethod
    def forward(_context, inputs):
        return torch.sigmoid(inputs)

    @staticmethod
    def backward(_context, gradient):
        return gradient * torch.nan


class SpoiltBend(nn.Module):
    def forward(self, inputs):
        return Spoilt.apply(inputs)


def test_a_gradient_that_is_not_finite_is_named(make_model):
    model = make_model("llama")
    model.model.layers[1].mlp.act_fn = SpoiltBend()
    with pytest.raises(NumericalError, match=r"outputs of model\.layers\.1\.mlp\.gate_proj is not"):
        collected(model, drawn())
