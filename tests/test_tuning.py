"""All blocks trained together, towards what the original model predicts."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import slimrank
from slimrank import CompressionOptions, LowRankLinear, compress
from slimrank.calibration import hold_out
from slimrank.errors import NumericalError, NumericalWarning, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
QUICK = {"epochs": 2, "learning_rate": 1e-3, "batch_sequences": 8}


@pytest.fixture(scope="module")
def text(make_windows):
    """Sixteen windows to calibrate on and eight that are held out, of 32 tokens."""
    return make_windows(24, 32)


@torch.no_grad()
def divergence(dense, model, windows):
    """KL(p ‖ p') over all positions, in nats a token, by the whole models."""
    ids = torch.stack(windows.windows)
    aim, found = (m(ids, use_cache=False).logits.double().log_softmax(-1) for m in (dense, model))
    return float((aim.exp() * (aim - found)).sum() / ids.numel())


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_what_is_reported_is_what_whole_models_give(layout, make_model, make_recipe, text):
    calibration, held_out = hold_out(text, 8)
    dense, untuned, model = (make_model("llama") for _ in range(3))
    recipe = {"method": "swift-svd", "layout": layout}
    compress(untuned, make_recipe(**recipe), windows=calibration)
    report = compress(model, make_recipe(tune=QUICK, **recipe), windows=text)
    found = report.tuning
    assert found.start_loss == pytest.approx(divergence(dense, untuned, calibration), rel=1e-4)
    start = divergence(dense, untuned, held_out)
    assert found.start_held_out_loss == pytest.approx(start, rel=1e-4)
    assert found.kept_epoch > 0
    kept = found.epochs[found.kept_epoch - 1].held_out_loss
    assert kept == pytest.approx(divergence(dense, model, held_out), rel=1e-4)
    assert divergence(dense, model, calibration) < 0.999 * found.start_loss
    assert [x.rank for x in report.linears] == [m.rank for m in low_rank(model)]


def low_rank(model):
    return [m for m in model.modules() if isinstance(m, LowRankLinear)]


def test_every_family(family, make_model, make_recipe, text):
    dense, model = make_model(family), make_model(family)
    recipe = make_recipe(keep=0.6, method="swift-svd", layout="auto", tune=QUICK)
    report = compress(model, recipe, windows=text)
    after = divergence(dense, model, hold_out(text, 8)[1])
    assert after <= report.tuning.start_held_out_loss * (1 + 1e-4)
    assert after == pytest.approx(
        ([report.tuning.start_held_out_loss] + [e.held_out_loss for e in report.tuning.epochs])[
            report.tuning.kept_epoch
        ],
        rel=1e-3,
    )


def test_after_blocks_were_trained_one_by_one(make_model, make_recipe, text, tmp_path):
    model = make_model("llama")
    recipe = make_recipe(method="aa-svd", refine="fast", tune=QUICK)
    report = compress(model, recipe, windows=text, out=tmp_path / "out")
    assert all(block.refinement for block in report.blocks)
    again = slimrank.load(tmp_path / "out")
    probe = text.windows[0][None]
    assert torch.equal(model(probe).logits, again(probe).logits)


@pytest.mark.parametrize(
    ("trains", "moved"), [(["norms"], {"norm"}), (["factors"], {"latent", "expand"})]
)
def test_only_what_is_named_is_trained(trains, moved, make_model, make_recipe, text):
    untuned, model = make_model("llama"), make_model("llama")
    compress(untuned, make_recipe(method="swift-svd"), windows=hold_out(text, 8)[0])
    tune = {**QUICK, "trains": trains, "patience": None}
    compress(model, make_recipe(method="swift-svd", tune=tune), windows=text)
    changed = [
        key
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, untuned.state_dict()[key])
    ]
    assert changed
    assert all(any(part in key for part in moved) for key in changed)
    assert not any("embed" in key or key == "model.norm.weight" for key in changed)


def test_half_precision_stays(make_model, make_recipe, text, tmp_path):
    model = make_model("qwen2", dtype=torch.bfloat16)
    tune = {**QUICK, "learning_rate": 3e-3}
    recipe = make_recipe(method="swift-svd", tune=tune)
    report = compress(model, recipe, windows=text, out=tmp_path / "out")
    assert report.tuning.kept_epoch > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    written = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {x.dtype for x in written} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", [False, True])
def test_no_graph_is_left(frozen, make_model, make_recipe, text):
    model = make_model("llama").requires_grad_(not frozen)
    compress(model, make_recipe(method="swift-svd", tune=QUICK), windows=text)
    for parameter in model.parameters():
        assert parameter.is_leaf
        assert parameter.grad is None
        assert parameter.requires_grad != frozen


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5}])
def test_the_grouping_of_sequences_does_not_matter(options, make_model, make_recipe, text):
    reports = [
        compress(
            make_model("llama"),
            make_recipe(method="swift-svd", tune=QUICK),
            windows=text,
            options=CompressionOptions(**given),
        )
        for given in ({}, options)
    ]
    one, other = ([e.loss for e in report.tuning.epochs] for report in reports)
    assert one == pytest.approx(other, rel=1e-3)


def test_a_limit_of_memory_changes_no_bit(make_model, make_recipe, text):
    models = []
    for memory in (None, 0):
        models.append(make_model("llama"))
        options = CompressionOptions(memory=memory)
        recipe = make_recipe(method="swift-svd", tune=QUICK)
        compress(models[-1], recipe, windows=text, options=options)
    one, other = (m.state_dict() for m in models)
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_no_held_out_text(make_model, make_recipe, text):
    recipe = make_recipe(method="swift-svd", tune=QUICK, calibration={"held_out_sequences": 0})
    told = "no held-out sequences.* epoch 2; hold sequences out, or set tune.patience to null"
    with pytest.warns(NumericalWarning, match=told):
        report = compress(make_model("llama"), recipe, windows=text)
    assert report.tuning.start_held_out_loss is None
    assert report.tuning.kept_epoch == 2


def test_a_rate_that_diverges_leaves_the_model(make_model, make_recipe, text):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    tune = {**QUICK, "learning_rate": 1e30, "clip_norm": None}
    with pytest.raises(NumericalError, match="training the blocks together"):
        compress(model, make_recipe(method="swift-svd", tune=tune), windows=text)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_nothing_to_train_is_told(make_model, make_recipe, text):
    tune = {**QUICK, "trains": ["biases"]}
    with pytest.raises(RecipeError, match="nothing to train: no biases in the blocks together"):
        compress(make_model("llama"), make_recipe(method="swift-svd", tune=tune), windows=text)
