"""The loss of predictions: its gradient is the whole model's, and it falls."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimrank.calibration import (
    ORIGINAL,
    SHIFTED,
    ActivationStore,
    RestOfModel,
    embed_streams,
    keep_final,
    stacked,
    step_forward,
)
from slimrank.calibration.lockstep import NEXT, TARGET
from slimrank.linalg import decompose_outputs
from slimrank.model import discover
from slimrank.nn import LowRankLinear
from slimrank.recipe import RefineRecipe
from slimrank.refine import MicroBatch, divergence, refine_block
from slimrank.refine.divergence import Divergence
from tolerances import TOLERANCE

CLOSE = TOLERANCE["forward", torch.float32]  # Llama norms in float32, whatever it is in
BLOCK = 0


class Arriving:
    """Sequences in front of a block of a whole model, from streams."""

    def __init__(self, streams, sequences):
        self.streams, self.sequences = streams, sequences

    @property
    def num_sequences(self):
        return len(self.sequences)

    def micro_batches(self, sequences):
        for numbers in self.streams.groups(self.sequences[number] for number in sequences):
            yield MicroBatch(
                stacked(self.streams.store, (SHIFTED,), numbers),
                stacked(self.streams.store, (TARGET,), numbers),
                self.streams.call(BLOCK, numbers),
                tuple(numbers),
            )


@pytest.fixture
def make_setting(make_model, make_windows):
    """A model whose first block is of low rank, what it was, and what stands behind that block."""

    def make(dtype=torch.float64, size=2, family="llama"):
        model = make_model(family, dtype=dtype)
        original = copy.deepcopy(model)
        windows, held_out = make_windows(6, 12), make_windows(3, 12, seed=1)
        anatomy = discover(model, torch.arange(12)[None])
        streams = embed_streams(model, anatomy, windows, held_out, size, ActivationStore())
        keep_final(model, anatomy, streams)
        block = next(model.get_submodule(anatomy.path).children())
        for numbers in streams.walk():
            args, kwargs = streams.call(BLOCK, numbers)
            with torch.no_grad():
                output = block(stacked(streams.store, (ORIGINAL,), numbers), *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            for number, states in zip(numbers, hidden, strict=True):
                streams.store.put((TARGET, number), states)
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                factors = decompose_outputs(linear.weight.detach().double()).truncate(10)
                pivoted = name.endswith(("o_proj", "up_proj"))
                block.set_submodule(name, LowRankLinear.from_factors(linear, factors, pivoted))
        return SimpleNamespace(
            model=model,
            original=original,
            block=block,
            windows=torch.stack([*windows.windows, *held_out.windows]),
            calibration=Arriving(streams, streams.calibration),
            held_out=Arriving(streams, streams.held_out),
            rest=RestOfModel(model, anatomy, streams, BLOCK),
        )

    return make


def wide(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def whole_divergence(setting, ids):
    """Mean over tokens, from the logits of both models."""
    with torch.no_grad():
        aim = wide(setting.original(input_ids=ids, use_cache=False).logits).log_softmax(-1)
    found = wide(setting.model(input_ids=ids, use_cache=False).logits).log_softmax(-1)
    return (aim.exp() * (aim - found)).sum(-1).mean()


@pytest.mark.parametrize("tokens", [256, 7, 1])
@pytest.mark.parametrize("size", [1, 4])
def test_value_and_gradient_are_the_whole_models(make_setting, monkeypatch, size, tokens):
    monkeypatch.setattr(divergence, "TOKENS", tokens)
    setting = make_setting(size=size)
    parameters = list(setting.block.parameters())
    expected = whole_divergence(setting, setting.windows[:6])
    wanted = torch.autograd.grad(expected, parameters)
    measure, value, count = Divergence(setting.rest), 0.0, 0
    for batch in setting.calibration.micro_batches(range(6)):
        total, new = measure.total(setting.block, batch)
        total.backward()
        value, count = value + total.item(), count + new
    assert count == 6 * 12
    assert value / count == pytest.approx(expected.item(), rel=CLOSE)
    assert value > 0
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert (parameter.grad / count - gradient).norm() <= CLOSE * gradient.norm()
    behind = [p for p in setting.model.parameters() if all(p is not own for own in parameters)]
    assert behind
    assert all(p.grad is None for p in behind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_through_a_rest_of_short_dtype(make_setting, dtype):
    setting = make_setting(dtype, family="opt")
    parameters = list(setting.block.float().parameters())
    for batch in setting.calibration.micro_batches(range(6)):
        total, _ = Divergence(setting.rest).total(setting.block, batch)
        total.backward()
    setting.model.float()
    setting.original.float()
    expected = 72 * whole_divergence(setting, setting.windows[:6])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    found = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert (found - wanted).norm() <= 0.1 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_falls(make_setting, dtype):
    setting = make_setting(dtype)
    before = [p.detach().clone() for p in setting.rest.model.lm_head.parameters()]
    settings = RefineRecipe(
        preset="fast", loss="kl", epochs=6, learning_rate=3e-3, batch_sequences=3, patience=None
    )
    report = refine_block(
        setting.block, setting.calibration, setting.calibration, settings, BLOCK, rest=setting.rest
    )
    assert report.loss == "kl"
    losses = [report.start_held_out_loss, *(epoch.held_out_loss for epoch in report.epochs)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    # nats a token, of the model that is left: parameters are rounded once more
    with torch.no_grad():
        found = whole_divergence(setting, setting.windows[:6]).item()
    rounding = {torch.bfloat16: 0.05, torch.float16: 0.05}.get(dtype, CLOSE)
    assert found == pytest.approx(losses[-1], rel=rounding)
    after = list(setting.rest.model.lm_head.parameters())
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_it_stops_by_held_out_predictions(make_setting):
    """What they should be is what they are at the start: any training is away from it."""
    setting = make_setting()
    store = setting.rest.streams.store
    before = {name: tensor.clone() for name, tensor in setting.block.state_dict().items()}
    with torch.no_grad():
        for batch in setting.held_out.micro_batches(range(3)):
            args, kwargs = batch.call
            hidden = setting.block(batch.inputs, *args, **kwargs)
            for number, states in zip(
                batch.numbers, setting.rest.states(hidden, batch.numbers), strict=True
            ):
                store.put(("final", number), states)
    settings = RefineRecipe(preset="fast", loss="kl", learning_rate=3e-3, patience=2)
    report = refine_block(
        setting.block, setting.calibration, setting.held_out, settings, BLOCK, rest=setting.rest
    )
    assert report.start_held_out_loss == pytest.approx(0, abs=1e-12)
    assert report.kept_epoch == 0
    assert len(report.epochs) == 2
    assert report.epochs[-1].loss < report.start_loss
    after = setting.block.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_aims_outlast_a_step_to_the_next_block(make_setting):
    setting = make_setting()
    streams = setting.rest.streams
    aims = setting.rest.wanted([0, 5])
    streams.store.move(TARGET, NEXT)  # nothing was compressed: both streams are the same
    for number in range(9):
        streams.store.put((TARGET, number), streams.store.get((NEXT, number)))
    step_forward(streams)
    assert torch.equal(setting.rest.wanted([0, 5]), aims)


def test_a_loss_without_the_rest(make_pairs):
    block, pairs = make_pairs()
    with pytest.raises(ValueError, match="'kl' needs the rest of the model"):
        refine_block(block, pairs, None, RefineRecipe(preset="paper", loss="kl"), 0)
