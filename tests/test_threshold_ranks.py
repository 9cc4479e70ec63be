"""Ranks by Zero Sum SVD: held against its formula, against real changes of the loss, and kept."""

import pytest
import torch
from torch import nn

from slimrank import CompressionOptions, CompressionReport, compress
from slimrank.allocation import LinearShape, threshold
from slimrank.checkpoint import read_profile
from slimrank.errors import CheckpointError, RecipeError
from slimrank.model import block_path, list_sites

CLOSE = 1e-5  # gradients are kept in float32


@pytest.fixture(scope="module")
def wanted(make_recipe):
    """`wanted(**recipe)` gives a recipe with these ranks."""

    def make(**others):
        return make_recipe(**{"allocation": "threshold", **others})

    return make


@pytest.fixture(scope="module")
def found(make_model, make_profile, wanted):
    """`found(method)` gives a profile of a Llama in float64."""
    known = {}

    def profiled(method="swift-svd"):
        if method not in known:
            model = make_model("llama", dtype=torch.float64)
            known[method] = make_profile(model, wanted(method=method))
        return known[method]

    return profiled


def mean_loss(model, windows):
    """Nats a token."""
    ids = torch.stack(windows.windows)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def changes_as_in_the_paper(model, windows):
    """``−σ_i u_iᵀ (∂ℓ/∂W) L⁻ᵀ v_i`` of all linears: roots, inverses, one backward."""
    names = [site.name for site in list_sites(model, block_path(model))]
    seen, handles = {}, []
    for name in names:

        def keep(_module, arguments, name=name):
            seen[name] = arguments[0].detach().flatten(0, 1)

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    mean_loss(model, windows).backward()
    for handle in handles:
        handle.remove()
    changes = {}
    for name in names:
        weight = model.get_submodule(name).weight
        root = torch.linalg.cholesky(seen[name].mT @ seen[name] / len(seen[name]))
        left, values, right = torch.linalg.svd(weight.detach() @ root, full_matrices=False)
        whitened = weight.grad @ torch.linalg.inv(root).mT
        changes[name] = -values * (left.mT @ whitened @ right.mT).diagonal()
    model.zero_grad()
    return changes


@pytest.mark.parametrize("method", ["swift-svd", "svd-llm"])
@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_ranks_are_those_of_the_papers_formula(
    make_model, wanted, windows, calibration_part, method, keep
):
    model = make_model("llama", dtype=torch.float64)
    changes = changes_as_in_the_paper(model, calibration_part)
    shapes = [
        LinearShape(s.name, s.shape.out_features, s.shape.in_features)
        for s in list_sites(model, block_path(model))
    ]
    recipe = wanted(keep=keep, method=method)
    report = compress(model, recipe, windows=windows)
    plan = threshold(shapes, changes, recipe.budget.budget())
    assert {x.name: x.rank for x in report.linears} == plan.ranks
    gone = torch.cat([changes[n][r:] for n, r in plan.ranks.items() if r is not None])
    rise = float(gone.clamp_min(0).sum())
    assert report.allocation.rise == pytest.approx(rise, rel=CLOSE)
    assert report.allocation.predicted_change == pytest.approx(float(gone.sum()), abs=CLOSE * rise)
    assert report.tokens == calibration_part.tokens


@pytest.mark.parametrize("method", ["swift-svd", "kfac-svd"])
@torch.no_grad()
def test_changes_are_those_of_the_loss(make_model, make_profile, wanted, calibration_part, method):
    """Central differences along single components; a family that never goes to float32."""
    model = make_model("opt", dtype=torch.float64)
    profile = make_profile(model, wanted(method=method))
    for name in ("0.self_attn.k_proj", "0.fc1", "1.fc2"):
        assert_changes_of_the_loss(
            model, f"model.decoder.layers.{name}", profile, calibration_part, method == "kfac-svd"
        )


def assert_changes_of_the_loss(model, name, profile, windows, in_metric):
    weight = model.get_submodule(name).weight
    dense, step = weight.clone(), 1e-4
    rank = profile.linears[name].stored_rank
    solved = profile.decomposition(name, dense, rank)
    for component in (0, rank - 1):
        gone = solved.truncate(component + 1).dense() - solved.truncate(component).dense()
        losses = []
        for sign in (1, -1):
            weight.copy_(dense - sign * step * gone)
            losses.append(float(mean_loss(model, windows)))
        weight.copy_(dense)
        slope = (losses[0] - losses[1]) / (2 * step)
        scale = float(profile.changes[name].abs().max())
        assert float(profile.changes[name][component]) == pytest.approx(slope, abs=CLOSE * scale)
    assert (solved.dual is not None) == in_metric


@pytest.mark.parametrize("method", ["swift-svd", "kfac-svd"])
def test_a_profile_with_changes_serves_every_size(make_model, wanted, found, windows, method):
    for keep in (0.8, 0.4):
        recipe = wanted(keep=keep, method=method)
        direct, built = (make_model("llama", dtype=torch.float64) for _ in range(2))
        expected = compress(direct, recipe, windows=windows)
        report = compress(built, recipe, profile=found(method).folder)
        assert {"gradients", "calibrate"} <= expected.seconds.keys()
        assert report.seconds.keys() == {"load", "allocate", "build"}
        state = direct.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in built.state_dict().items())
        assert report.allocation.predicted_change == expected.allocation.predicted_change
        assert report.size.target_params <= keep * report.size.target_params_before
        assert CompressionReport.from_json(report.model_dump_json(), "report") == report


def test_changes_are_read_back_as_they_were_made(found):
    profile = found()
    again = read_profile(profile.folder)
    assert again.changes.keys() == profile.linears.keys()
    for name, entry in again.linears.items():
        assert len(again.changes[name]) == min(entry.out_features, entry.in_features)


def test_a_profile_without_changes_is_refused(make_model, make_profile, make_recipe, wanted):
    model = make_model("llama")
    profile = make_profile(model, make_recipe())
    assert profile.changes == {}
    with pytest.raises(CheckpointError, match=r"made without the weight gradients .* leave --prof"):
        compress(model, wanted(), profile=profile.folder)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "aa-svd"])
def test_other_methods_have_the_ranks_of_swift_svd(make_model, wanted, windows, method):
    expected = compress(make_model("llama"), wanted(), windows=windows)
    model = make_model("llama")
    report = compress(model, wanted(method=method), windows=windows)
    assert [x.rank for x in report.linears] == [x.rank for x in expected.linears]
    change = expected.allocation.predicted_change  # other batches, other rounding
    assert report.allocation.predicted_change == pytest.approx(change, rel=CLOSE)


def test_what_is_spilled_is_the_same(make_model, wanted, windows, tmp_path):
    models = [make_model("llama") for _ in range(2)]
    for number, model in enumerate(models):
        options = CompressionOptions(memory=None if number else 0)
        compress(model, wanted(), windows=windows, out=tmp_path / str(number), options=options)
    state = models[1].state_dict()
    assert all(torch.equal(x, state[name]) for name, x in models[0].state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
@pytest.mark.parametrize("family", ["phi3", "opt", "falcon", "mixtral"])
def test_on_other_families_and_with_a_cache_of_latents(family, make_model, wanted, windows):
    kv = {"kv_cache": {"keep": 0.5}} if family == "phi3" else {}
    report = compress(make_model(family), wanted(layout="auto", **kv), windows=windows)
    size, allocation = report.size, report.allocation
    assert size.target_params <= 0.5 * size.target_params_before
    assert len({x.rank for x in report.linears}) > 2
    # what is left of the balance is at most what rises
    assert abs(allocation.predicted_change) <= allocation.rise


def test_labels_of_the_model_have_no_mean_gradient(wanted):
    with pytest.raises(RecipeError, match=r"zero but for chance .* leave gradients\.labels at"):
        wanted(gradients={"labels": "model"})
