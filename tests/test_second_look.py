"""Two passes: statistics of the original model and of a first compression, merged."""

import copy
from contextlib import ExitStack

import pytest
import torch

from slimrank import CompressionOptions, compress
from slimrank.calibration import ActivationStore, collect_gradients, hold_out
from slimrank.errors import NumericalError, RecipeError
from slimrank.frontier.making import served_by_profile
from slimrank.linalg import Moments, decompose_in_metric, decompose_outputs
from slimrank.methods import KFACSVD
from slimrank.model import discover
from slimrank.statistics import AGAIN, Statistics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning"),
    pytest.mark.filterwarnings("ignore:uniform ranks do better:slimrank.errors.NumericalWarning"),
]
CLOSE = 1e-4  # of float32 sums over tokens that were batched otherwise
KFAC = {"method": "kfac-svd", "allocation": "global"}


@pytest.fixture(scope="module")
def text(make_windows):
    """Sixteen windows to calibrate on and eight that are held out, of 32 tokens."""
    return make_windows(24, 32)


@torch.no_grad()
def input_moment(model, name, windows):
    """Mean of the outer products of what arrives at a linear, in float64."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: found.append(args[0].double().flatten(0, -2))
    )
    model(input_ids=torch.stack(windows.windows), use_cache=False)
    hook.remove()
    tokens = torch.cat(found)
    return tokens.mT @ tokens / len(tokens)


def output_metrics(model, anatomy, windows):
    with ActivationStore() as store:
        found = collect_gradients(model, anatomy, windows, batch_size=4, store=store)
        return {name: metric for block in found for name, metric in block.metrics.items()}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_moments_are_those_of_both_models(family, make_model, make_recipe, text):
    calibration, _ = hold_out(text, 8)
    dense, first, second = (make_model(family) for _ in range(3))
    compress(first, make_recipe(method="swift-svd"), windows=calibration)
    report = compress(second, make_recipe(method="swift-svd", passes=2), windows=text)
    assert report.tokens == calibration.tokens
    for linear in report.linears:
        weight = dense.get_submodule(linear.name).weight
        both = (
            input_moment(dense, linear.name, calibration)
            + input_moment(first, linear.name, calibration)
        ) / 2
        expected = decompose_outputs(weight, both)
        share = expected.loss(linear.rank) / expected.energy
        assert linear.predicted_loss == pytest.approx(share, rel=CLOSE, abs=1e-7)
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-5, abs=1e-9)


def test_metrics_are_those_of_both_models(make_model, make_recipe, text):
    calibration, _ = hold_out(text, 8)
    dense, first, second = (make_model("llama") for _ in range(3))
    anatomy = discover(dense, torch.arange(12)[None])
    compress(first, make_recipe(method="kfac-svd"), windows=calibration)
    report = compress(second, make_recipe(method="kfac-svd", passes=2), windows=text)
    of_dense, of_first = (output_metrics(m, anatomy, calibration) for m in (dense, first))
    for linear in report.linears:
        name = linear.name
        both = (input_moment(dense, name, calibration) + input_moment(first, name, calibration)) / 2
        metric = (of_dense[name] + of_first[name]) / 2
        weighed = KFACSVD().metric(Moments(both, 1, metric=metric.double()))
        expected = decompose_in_metric(dense.get_submodule(name).weight, both, weighed)
        share = expected.loss(linear.rank) / expected.energy
        assert linear.predicted_loss == pytest.approx(share, rel=CLOSE, abs=1e-7)


@pytest.mark.parametrize(
    "how",
    [
        KFAC,
        {**KFAC, "layout": "pivoted", "kv_cache": {"keep": 0.5}},
        {**KFAC, "refine": "fast"},
        {"method": "kfac-aa-svd", "allocation": "global"},
        {"method": "asvd"},
        {"method": "fwsvd"},
        {"method": "aa-svd", "allocation": "swift", "swift": {"importance_weight": 0.5}},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_way_keeps_its_promises_and_its_budget(how, make_model, make_recipe, text):
    model = make_model("llama")
    report = compress(model, make_recipe(keep=0.6, passes=2, **how), windows=text)
    assert report.size.target_params <= 0.6 * report.size.target_params_before
    for linear in report.linears:
        if linear.rank is not None:
            assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=CLOSE, abs=1e-6)
    once = make_model("llama")
    compress(once, make_recipe(keep=0.6, **how), windows=text)
    probe = text.windows[0][None]
    assert not torch.allclose(
        model(probe, use_cache=False).logits, once(probe, use_cache=False).logits, atol=1e-5
    )


@pytest.mark.parametrize("family", ["gemma3", "opt", "phi3", "qwen2_tied", "falcon"])
def test_other_families(family, make_model, make_recipe, text):
    model = make_model(family)
    report = compress(model, make_recipe(keep=0.6, passes=2, **KFAC), windows=text)
    assert report.seconds["second look"] > 0
    assert report.size.target_params <= 0.6 * report.size.target_params_before
    assert all(x.token_check < 1e-3 for x in report.linears if x.rank is not None)


def test_experts_that_one_model_routes_nothing_to(make_experts_model, make_recipe, text):
    model = make_experts_model(closed=(1,))
    with pytest.warns(match="saw 0 tokens"):
        report = compress(model, make_recipe(method="swift-svd", passes=2), windows=text)
    assert sum(x.tokens == 0 for x in report.linears) > 0


@pytest.mark.parametrize("how", [KFAC, {"method": "kfac-aa-svd"}])
def test_a_limit_of_memory_changes_no_bit(how, make_model, make_recipe, text, tmp_path):
    free, limited = make_model("llama"), make_model("llama")
    compress(free, make_recipe(passes=2, **how), windows=text)
    options = CompressionOptions(memory=0)
    recipe = make_recipe(passes=2, **how)
    compress(limited, recipe, windows=text, options=options, out=tmp_path / "out")
    assert free.state_dict().keys() == limited.state_dict().keys()
    for key, tensor in free.state_dict().items():
        assert torch.equal(tensor, limited.state_dict()[key]), key
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_look_that_fails_leaves_the_model(make_model, make_recipe, text, monkeypatch):
    def fail(*_args):
        raise NumericalError("not finite")

    monkeypatch.setattr("slimrank.making.look_again", fail)
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="not finite"):
        compress(model, make_recipe(passes=2, **KFAC), windows=text)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_profile_is_of_one_pass(make_model, make_recipe, make_profile, text):
    recipe = make_recipe(passes=2, method="swift-svd")
    with pytest.raises(RecipeError, match="a profile is of one pass"):
        compress(make_model("llama"), recipe, profile="folder")
    assert served_by_profile(recipe) is None


def test_moments_merge_by_tokens():
    with ExitStack() as stack:
        store = stack.enter_context(ActivationStore())
        store.put((AGAIN, "q"), torch.diag(torch.tensor([6.0, 0.0], dtype=torch.float64)))
        known = Statistics(store, tokens=9, again={"k": ("q", 10)})
        own = Moments(torch.eye(2, dtype=torch.float64), 30)
        merged = known.of("k", own)
        assert merged.original.tolist() == [[2.25, 0.0], [0.0, 0.75]]
        assert merged.tokens == 40
        assert known.of("v", own).original is own.original
        shifted = Moments(own.original, 30, shifted=own.original)
        assert known.of("k", shifted).original is own.original
