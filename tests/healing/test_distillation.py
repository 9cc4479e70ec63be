"""The loss, its gradient and what is measured, against plain code on whole logits."""

import copy

import pytest
import torch
from torch import nn

from slimrank import LowRankLinear, TokenWindows
from slimrank.errors import ModelError, NumericalError
from slimrank.healing.distillation import Distillation, HeldOut
from slimrank.healing.predictor import Predictor
from slimrank.healing.trained import trained_parameters
from slimrank.refine import divergence

QUIET = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
LENGTH = 20
CLOSE = 1e-5  # of what float32 norms and rotary embeddings leave
STEP = 1e-3  # of a difference: above what they leave, below where the curve bends


@pytest.fixture
def make_pair(make_compressed, make_model, make_windows, tiny):
    """`make_pair(family)`: a distillation in float64, and token ids.

    Fused experts have no product in float64.
    """

    def make(family, **recipe):
        student, _ = make_compressed(family, **recipe)
        dtype = torch.float32 if family in tiny.FUSED else torch.float64
        models = [student.to(dtype), make_model(family).to(dtype)]
        ids = torch.stack(make_windows(3, LENGTH, seed=2).windows)
        return Distillation(*(Predictor.of(model, ids[0]) for model in models)), ids

    return make


def plain_divergence(distillation, ids):
    student, teacher = (
        each.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        for each in (distillation.student, distillation.teacher)
    )
    return (teacher.exp() * (teacher - student)).sum()


@QUIET
@pytest.mark.parametrize("tokens", [7, 256])
def test_value_and_gradient_are_those_of_whole_logits(family, tokens, make_pair, monkeypatch):
    monkeypatch.setattr(divergence, "TOKENS", tokens)
    distillation, ids = make_pair(family)
    trained = trained_parameters(distillation.student)
    expected = plain_divergence(distillation, ids)
    wanted = torch.autograd.grad(expected, trained, allow_unused=True)
    total, count = distillation.total(ids)
    found = torch.autograd.grad(total, trained, allow_unused=True)
    assert count == ids.numel()
    assert total.item() == pytest.approx(expected.item(), rel=CLOSE)
    size = torch.cat([g.flatten() for g in wanted if g is not None]).norm()
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() < CLOSE * size


def test_a_pivoted_layer_has_its_gradient(make_pair):
    distillation, ids = make_pair("llama", layout="pivoted")
    layer = distillation.student.model.model.layers[0].mlp.up_proj
    assert layer.pivoted
    weights = [layer.latent.weight, layer.expand.weight]
    total, _ = distillation.total(ids)
    gradients = torch.autograd.grad(total, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype
        )
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * STEP)
                values.append(plain_divergence(distillation, ids).item())
                weight.sub_(direction, alpha=sign * STEP)
        slope = float((gradient * direction).sum())
        assert (values[0] - values[1]) / (2 * STEP) == pytest.approx(slope, rel=5e-3)


def test_what_is_measured(make_pair):
    distillation, ids = make_pair("gemma2")
    windows = TokenWindows((*ids, ids[0, :7]))
    held_out = HeldOut.of(distillation, windows, size=2)
    found, perplexity = held_out.measure()
    total = plain_divergence(distillation, ids) + plain_divergence(distillation, ids[:1, :7])
    assert found == pytest.approx(total.item() / windows.tokens, rel=CLOSE)
    for model, value in (
        (distillation.student.model, perplexity),
        (distillation.teacher.model, held_out.teacher_perplexity()),
    ):
        losses = [
            nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:]).detach()
            * (len(w) - 1)
            for w in windows.windows
        ]
        mean = sum(losses) / sum(len(w) - 1 for w in windows.windows)
        assert value == pytest.approx(float(mean.exp()), rel=CLOSE)


def test_a_model_has_no_divergence_from_itself(make_pair):
    distillation, ids = make_pair("llama")
    same = Distillation(distillation.teacher, distillation.teacher)
    assert abs(HeldOut.of(same, TokenWindows(tuple(ids)), 3).measure()[0]) < 1e-12


def test_a_held_out_loss_that_is_not_finite(make_pair):
    distillation, ids = make_pair("llama")
    held_out = HeldOut.of(distillation, TokenWindows(tuple(ids)), 3)
    with torch.no_grad():
        distillation.student.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="loss on the held-out sequences is not finite"):
        held_out.measure()


def test_the_sum_is_the_same_by_any_cut(monkeypatch, make_pair):
    distillation, ids = make_pair("llama")
    sums = []
    for tokens in (1, 13, 999):
        monkeypatch.setattr(divergence, "TOKENS", tokens)
        sums.append(float(distillation.total(ids)[0].detach()))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)


def names_of(predictor):
    found = {id(p) for p in trained_parameters(predictor)}
    return {name for name, p in predictor.model.named_parameters() if id(p) in found}


@QUIET
def test_trained_are_factors_and_norms(family, make_pair):
    distillation, _ = make_pair(family)
    model = distillation.student.model
    names = names_of(distillation.student)
    low = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert low
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        of_factors = any(owner == n or owner.startswith(f"{n}.") for n in low)
        is_norm = "norm" in owner.rpartition(".")[2].lower() or "ln_f" in owner
        assert (name in names) == (parameter.numel() > 0 and (of_factors or is_norm)), name


def test_what_stands_in_front_of_the_blocks_is_left_alone(make_pair):
    distillation, ids = make_pair("llama")
    model = distillation.student.model

    class Normed(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.embedding, self.front = embedding, nn.LayerNorm(32).double()
            self.weight, self.num_embeddings = embedding.weight, embedding.num_embeddings

        def forward(self, ids):
            return self.front(self.embedding(ids))

    model.model.embed_tokens = Normed(model.model.embed_tokens)
    names = names_of(Predictor.of(model, ids[0]))
    assert "model.norm.weight" in names
    assert not any("embed_tokens" in name for name in names)


def test_dense_models_have_nothing_to_train(make_pair):
    distillation, _ = make_pair("llama")
    assert trained_parameters(distillation.teacher) == []


def test_blocks_that_hand_on_more_are_refused(make_pair):
    distillation, ids = make_pair("llama")
    model = copy.deepcopy(distillation.teacher.model)
    first, second = model.model.layers
    real = second.forward
    seen = []
    first.register_forward_hook(lambda _m, _a, output: seen.append(output))
    second.forward = lambda hidden, *a, **k: real(hidden + len(seen), *a, **k)
    with pytest.raises(ModelError, match="more than hidden states"):
        Predictor.of(model, ids[0])
