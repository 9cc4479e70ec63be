"""What a refinement gains, what it trains, and where it stops."""

import pytest
import torch
from torch import nn

from slimrank.errors import NumericalWarning, RecipeError
from slimrank.linalg import decompose_outputs
from slimrank.nn import LowRankLinear
from slimrank.recipe import RefineRecipe
from slimrank.refine import refine_block


def state_of(block):
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def changed(block, before):
    return {name for name, now in block.state_dict().items() if not torch.equal(now, before[name])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_loss_falls(make_pairs, family, dtype):
    block, pairs = make_pairs(family, dtype)
    settings = RefineRecipe(preset="paper", epochs=12, learning_rate=3e-3, batch_sequences=3)
    report = refine_block(block, pairs, pairs, settings, 0)
    losses = [report.start_loss, *(epoch.loss for epoch in report.epochs)]
    assert losses[-1] < 0.8 * losses[0]
    # the order of steps is fixed, and rates are small: each epoch is better than the one before
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert report.epochs[-1].held_out_loss < report.start_held_out_loss
    assert report.kept_epoch == len(report.epochs) == 12
    seconds = [epoch.seconds for epoch in report.epochs]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] <= seconds[-1] <= report.seconds
    after = refine_block(block, pairs, None, settings.model_copy(update={"epochs": 1}), 0)
    rounding = {torch.bfloat16: 0.02, torch.float16: 0.003}.get(dtype, 1e-6)
    assert after.start_loss == pytest.approx(report.epochs[-1].held_out_loss, rel=rounding)


@pytest.mark.parametrize(
    ("trains", "endings"),
    [
        (["factors"], ("latent.weight", "expand.weight")),
        (["biases"], ("bias",)),
        (["norms"], ("layernorm.weight",)),
        (["norms", "biases"], ("layernorm.weight", "bias")),
        (None, ("latent.weight", "expand.weight", "layernorm.weight", "bias")),
    ],
)
def test_only_what_is_named_is_trained(make_pairs, trains, endings):
    block, pairs = make_pairs("qwen2", dense=("down_proj", "q_proj"))
    before = state_of(block)
    given = {} if trains is None else {"trains": trains}
    settings = RefineRecipe(preset="paper", epochs=2, **given)
    report = refine_block(block, pairs, None, settings, 0)
    expected = {name for name in before if name.endswith(endings)}
    if "bias" in endings:
        expected -= {"self_attn.k_proj.bias"}  # softmax does not see it: no gradient but rounding
    assert changed(block, before) - {"self_attn.k_proj.bias"} == expected
    assert "self_attn.q_proj.weight" not in changed(block, before)
    sizes = {name: p.numel() for name, p in block.named_parameters() if name.endswith(endings)}
    assert report.trained_params == sum(sizes.values())


def test_nothing_to_train(make_pairs):
    block, pairs = make_pairs("llama")
    before = state_of(block)
    settings = RefineRecipe(preset="paper", trains=["biases"])
    with pytest.raises(RecipeError, match="nothing to train: no biases in block 3"):
        refine_block(block, pairs, None, settings, 3)
    assert not changed(block, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_held_out_text_that_only_gets_worse_keeps_the_start(make_pairs, dtype):
    """Its targets are the calibration's, mirrored at what the block gives now."""
    block, pairs = make_pairs(dtype=dtype)
    before = state_of(block)
    with torch.no_grad():
        outputs = [block(x[None], **pairs.calls(len(x))[1])[0] for x in pairs.inputs]
    mirrored = [2 * y - target for y, target in zip(outputs, pairs.targets, strict=True)]
    settings = RefineRecipe(preset="fast", learning_rate=3e-3, patience=2)
    report = refine_block(block, pairs, pairs.again(targets=mirrored), settings, 0)
    assert report.kept_epoch == 0
    assert len(report.epochs) == 2
    assert report.epochs[-1].loss < report.start_loss
    assert all(epoch.held_out_loss > report.start_held_out_loss for epoch in report.epochs)
    assert not changed(block, before)


def test_the_best_epoch_in_between_is_kept(make_pairs):
    """Held-out targets move: loss falls twice, rises, falls to no less, rises."""
    block, pairs = make_pairs()
    held_out, seen = pairs.again(size=6), []

    def moving(sequences):
        offset = [50.0, 40.0, 30.0, 45.0, 35.0, 50.0, 1.0][len(seen)]
        seen.append(state_of(block))
        away = [target + offset for target in pairs.targets]
        return pairs.again(targets=away).micro_batches(sequences)

    held_out.micro_batches = moving
    settings = RefineRecipe(preset="fast", patience=3, epochs=8)
    report = refine_block(block, pairs, held_out, settings, 0)
    assert report.kept_epoch == 2
    assert len(report.epochs) == 5
    assert not changed(block, seen[2])
    assert all(changed(block, seen[epoch]) for epoch in (1, 3))


def test_without_patience_the_last_is_kept(make_pairs):
    block, pairs = make_pairs()
    away = [target + 50 * target.mean() for target in pairs.targets]
    settings = RefineRecipe(preset="paper", epochs=4)
    report = refine_block(block, pairs, pairs.again(targets=away), settings, 0)
    assert report.kept_epoch == len(report.epochs) == 4
    assert all(epoch.held_out_loss is not None for epoch in report.epochs)


def test_patience_without_held_out_text(make_pairs):
    block, pairs = make_pairs()
    before = state_of(block)
    told = "to the end of epoch 3; hold sequences out, or set refine.patience to null"
    with pytest.warns(NumericalWarning, match=told):
        report = refine_block(block, pairs, None, RefineRecipe(preset="fast", epochs=3), 0)
    assert report.kept_epoch == len(report.epochs) == 3
    assert report.start_held_out_loss is None
    assert changed(block, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [6, 16])
def test_pivoted_linears_are_trained_too(make_pairs, dtype, rank):
    """At rank 16, which is all that k_proj and v_proj put out, each row is a pivot."""
    block, pairs = make_pairs("qwen2", dtype)
    for name, layer in list(block.named_modules()):
        if isinstance(layer, LowRankLinear):
            linear = layer.to_linear()
            with torch.no_grad():  # back to a rank above the six that are left
                generator = torch.Generator().manual_seed(0)
                noise = torch.randn(linear.weight.shape, generator=generator)
                linear.weight += 0.05 * noise.to(dtype)
            factors = decompose_outputs(linear.weight.detach().double()).truncate(rank)
            block.set_submodule(name, LowRankLinear.from_factors(linear, factors, pivoted=True))
    assert (block.self_attn.k_proj.expand.weight.numel() == 0) == (rank == 16)
    before = state_of(block)
    settings = RefineRecipe(preset="paper", epochs=6, learning_rate=3e-3, batch_sequences=3)
    report = refine_block(block, pairs, None, settings, 0)
    assert report.epochs[-1].loss < 0.9 * report.start_loss
    trained = {name for name, tensor in before.items() if tensor.numel() and "pivots" not in name}
    assert changed(block, before) | {"self_attn.k_proj.bias"} == trained
    assert report.trained_params == sum(before[name].numel() for name in trained)


class Dropping(nn.Module):
    """Answers with a tuple, and drops half of the states where it is trained."""

    def __init__(self):
        super().__init__()
        self.linear = LowRankLinear(32, 32, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, states, shift, scale=1.0):
        return self.dropout(scale * self.linear(states) + shift), None


def test_tuples_arguments_and_dropout(make_pairs):
    _, pairs = make_pairs(dtype=torch.float32)
    pairs.calls = lambda _length: ((0.5,), {"scale": 2.0})
    refined = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            block = Dropping().train()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            inputs, targets = torch.stack(pairs.inputs), torch.stack(pairs.targets)
            errors = 2 * block.linear(inputs) + 0.5 - targets
        report = refine_block(block, pairs, None, RefineRecipe(preset="paper", epochs=2), 0)
        expected = errors.square().mean() / targets.var(correction=0)
        assert report.start_loss == pytest.approx(float(expected), rel=1e-5)
        assert block.dropout.training
        refined.append(state_of(block))
    assert not changed(block, refined[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(make_pairs, dtype):
    settings = RefineRecipe(preset="paper", epochs=4, learning_rate=3e-3)
    block, pairs = make_pairs("qwen2", dtype)
    on_cpu = refine_block(block, pairs, None, settings, 0)
    reports, states = [], []
    for _ in range(2):
        block, pairs = make_pairs("qwen2", dtype)
        positions = tuple(part.cuda() for part in pairs.calls(8)[1]["position_embeddings"])
        pairs.calls = lambda _, p=positions: ((), {"position_embeddings": p})
        pairs.inputs = [part.cuda() for part in pairs.inputs]
        pairs.targets = [part.cuda() for part in pairs.targets]
        reports.append(refine_block(block.cuda(), pairs, None, settings, 0))
        states.append(state_of(block))
    rounding = {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    assert reports[0].epochs[-1].loss == pytest.approx(on_cpu.epochs[-1].loss, rel=rounding)
    assert not changed(block, states[0])
