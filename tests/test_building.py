"""A size from a profile is the one that a direct run gives; a profile of something else is not."""

import copy
import warnings

import pytest
import torch

from slimrank import LowRankLinear, TokenWindows, compress
from slimrank.errors import CheckpointError, NumericalWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_same_promises(built, direct):
    """All that both reports say of a linear agrees."""
    assert built.size == direct.size
    assert built.tokens == direct.tokens
    assert built.calibration_fingerprint == direct.calibration_fingerprint
    exact = {"name", "rank", "params", "params_before", "tokens", "jitter"}
    for one, other in zip(built.linears, direct.linears, strict=True):
        assert one.model_dump(include=exact) == other.model_dump(include=exact)
        if one.rank is None:
            continue
        assert one.predicted_loss == other.predicted_loss
        assert one.effective_rank == other.effective_rank
        assert one.measured_loss == pytest.approx(other.measured_loss, rel=1e-9, abs=1e-12)
        assert one.stored_loss is None


def dense(model):
    return not any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.fixture(scope="module")
def found(make_model, make_profile):
    return make_profile(make_model("llama"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "falcon", "mixtral"])
def test_the_factors_are_those_of_a_direct_run(
    family, make_model, make_recipe, make_profile, calibration_part
):
    direct, built = make_model(family), make_model(family)
    expected = compress(direct, make_recipe(), windows=calibration_part)
    report = compress(built, make_recipe(), profile=make_profile(built).folder)
    assert_same_state(built, direct)
    assert_same_promises(report, expected)


@pytest.mark.parametrize("method", ["swift-svd", "svd-llm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_from_one_profile(
    make_model, make_recipe, make_profile, calibration_part, method, dtype, monkeypatch
):
    sizes = (0.8, 0.3)
    direct = [make_model("qwen2", dtype=dtype) for _ in sizes]
    expected = [
        compress(model, make_recipe(keep=keep, method=method), windows=calibration_part)
        for model, keep in zip(direct, sizes, strict=True)
    ]
    source = make_model("qwen2", dtype=dtype)
    folder = make_profile(source, make_recipe(method=method)).folder
    monkeypatch.setattr("slimrank.blockwise.embed_batches", None)
    for model, keep, other in zip(direct, sizes, expected, strict=True):
        built = make_model("qwen2", dtype=dtype)
        report = compress(built, make_recipe(keep=keep, method=method), profile=folder)
        assert_same_state(built, model)
        assert_same_promises(report, other)
        assert report.seconds.keys() == {"load", "build"}


def test_listed_experts(make_experts_model, make_recipe, make_profile, calibration_part):
    direct, built = (make_experts_model(closed=(2,)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        expected = compress(direct, make_recipe(), windows=calibration_part)
        folder = make_profile(built).folder
    report = compress(built, make_recipe(), profile=folder)
    assert_same_state(built, direct)
    assert_same_promises(report, expected)


def test_some_of_the_targets(make_model, make_recipe, found, calibration_part):
    recipe = make_recipe(targets=["up_proj", "v_proj"])
    direct, built = make_model("llama"), make_model("llama")
    expected = compress(direct, recipe, windows=calibration_part)
    assert_same_promises(compress(built, recipe, profile=found.folder), expected)
    assert_same_state(built, direct)


def test_a_profile_for_latents_adds_no_targets(make_model, make_recipe, make_profile):
    for family, name in (("llama", "up_proj"), ("phi3", "down_proj")):
        model = make_model(family)
        folder = make_profile(model, for_kv_cache=True).folder
        report = compress(model, make_recipe(targets=[name]), profile=folder)
        assert {x.name.rsplit(".", 1)[1] for x in report.linears} == {name}
        kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
        assert kinds == {"Linear", "LowRankLinear"}


def test_gradients_are_not_taken_again_for_ranks_that_a_profile_tells(
    make_model, make_recipe, make_profile, windows
):
    """Whoever took them for the ranks alone finds the ranks in the profile."""
    recipe = make_recipe(method="swift-svd", allocation="global")
    model = make_model("llama")
    folder = make_profile(model, recipe.for_profile()).folder
    report = compress(model, recipe, windows=windows, profile=folder)
    assert report.allocation.unit == "kfac"
    assert "gradients" not in report.seconds
    other = compress(make_model("llama"), recipe, windows=windows)
    assert "gradients" in other.seconds
    assert {x.name: x.rank for x in other.linears} == {x.name: x.rank for x in report.linears}


def test_a_folder_from_a_profile(
    dense_folder, make_recipe, make_profile, compressed_folder, tmp_path, tiny_tokenizer
):
    """The text is as long as both draws, so the first windows agree."""
    folder = make_profile(dense_folder, windows=None).folder
    compress(dense_folder, make_recipe(layout="auto"), out=tmp_path / "out", profile=folder)
    one, other = (p / "model.safetensors" for p in (tmp_path / "out", compressed_folder))
    assert one.read_bytes() == other.read_bytes()


def test_spectra_only_reads_but_does_not_compress(make_model, make_recipe, make_profile):
    model = make_model("llama")
    found = make_profile(model, spectra_only=True)
    assert len(found.allocation_profiles()) == 14
    assert not list(found.folder.glob("block-*"))
    for allocation in ("uniform", "swift"):
        with pytest.raises(CheckpointError, match="holds spectra only: enough to plan"):
            compress(model, make_recipe(allocation=allocation), profile=found.folder)
        assert dense(model)


def test_another_model_is_refused(make_model, make_recipe, found):
    other = make_model("llama", seed=1)
    with pytest.raises(CheckpointError, match=r"is a profile of .* with other weights than Llama"):
        compress(other, make_recipe(), profile=found.folder)
    almost = make_model("llama")
    almost.model.norm.weight.data[0] += 1e-6
    with pytest.raises(CheckpointError, match="other weights"):
        compress(almost, make_recipe(), profile=found.folder)
    assert dense(other)


def test_another_dtype_is_refused(make_model, make_recipe, found):
    model = make_model("llama", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="profile in float32; the model is in bfloat16"):
        compress(model, make_recipe(), profile=found.folder)


def test_another_method_is_refused(make_model, make_recipe, found):
    model = make_model("llama")
    with pytest.raises(CheckpointError, match="by swift-svd; the recipe asks for svd-llm"):
        compress(model, make_recipe(method="svd-llm"), profile=found.folder)
    assert dense(model)


def test_another_ridge_is_refused(make_model, make_recipe, make_profile, found):
    model = make_model("llama")
    ridged = make_profile(model, make_recipe(ridge=0.1)).folder
    for folder, recipe, said in (
        (found.folder, make_recipe(ridge=0.1), "a ridge of 0; the recipe asks for 0.1"),
        (ridged, make_recipe(), "a ridge of 0.1; the recipe asks for 0"),
        (ridged, make_recipe(method="aa-svd", allocation="swift"), "a ridge of 0.1; .* for 0"),
    ):
        with pytest.raises(CheckpointError, match=said):
            compress(model, recipe, profile=folder)
    assert dense(model)


def test_a_ridge_is_in_the_profile(make_model, make_recipe, make_profile, calibration_part):
    recipe = make_recipe(ridge=0.1)
    direct, built = make_model("llama"), make_model("llama")
    expected = compress(direct, recipe, windows=calibration_part)
    report = compress(built, recipe, profile=make_profile(built, recipe).folder)
    assert_same_state(built, direct)
    assert_same_promises(report, expected)


@pytest.mark.parametrize("method", ["svd", "aa-svd", "shift-aware"])
def test_a_method_that_has_no_profile_takes_its_ranks_from_one(
    method, make_model, make_recipe, found, windows
):
    """In one-shot order; `found` is by swift-svd."""
    swift = {"allocation": "swift", "swift": {"importance_weight": 0.5}, "order": "one-shot"}
    expected = compress(make_model("llama"), make_recipe(**swift), profile=found.folder)
    model = make_model("llama")
    recipe = make_recipe(method=method, **swift)
    report = compress(model, recipe, windows=windows, profile=found.folder)
    assert [x.rank for x in report.linears] == [x.rank for x in expected.linears]
    assert report.allocation == expected.allocation
    assert report.tokens == (0 if method == "svd" else 96)
    assert not dense(model)


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_sequences": 7}, {"sequence_length": 31}])
def test_another_text_is_refused(make_model, make_recipe, make_profile, tiny_tokenizer, change):
    recipe = make_recipe()
    folder = make_profile(make_model("llama"), windows=None, tokenizer=tiny_tokenizer).folder
    other = make_recipe(calibration=recipe.calibration.model_dump() | change)
    model = make_model("llama")
    with pytest.raises(CheckpointError, match="a profile on other text than the recipe's; leave"):
        compress(model, other, profile=folder, tokenizer=tiny_tokenizer)
    assert dense(model)


def test_the_same_text_is_accepted(make_model, make_recipe, make_profile, tiny_tokenizer):
    folder = make_profile(make_model("llama"), windows=None, tokenizer=tiny_tokenizer).folder
    settings = make_recipe().calibration.model_dump()
    same_draw = make_recipe(calibration=settings | {"held_out_sequences": 3})
    for recipe in (make_recipe(), make_recipe(calibration={}), same_draw):
        report = compress(make_model("llama"), recipe, profile=folder, tokenizer=tiny_tokenizer)
        assert report.recipe.calibration == make_recipe().calibration


def test_windows_that_are_given_are_compared(
    make_model, make_recipe, make_windows, windows, calibration_part, found
):
    for same in (windows, calibration_part):
        compress(make_model("llama"), make_recipe(), windows=same, profile=found.folder)
    fewer = TokenWindows(windows.windows[:3])
    for other in (make_windows(seed=1), fewer):
        with pytest.raises(CheckpointError, match="other tokens than the windows given"):
            compress(make_model("llama"), make_recipe(), windows=other, profile=found.folder)


def test_targets_beyond_it_are_refused(make_model, make_recipe, make_profile):
    model = make_model("llama")
    folder = make_profile(model, make_recipe(targets=["up_proj"])).folder
    with pytest.raises(CheckpointError, match=r"nothing of 12 targets, such as model\.layers\.0\."):
        compress(model, make_recipe(), profile=folder)
    assert dense(model)


def test_ranks_beyond_it_are_refused(make_model, make_recipe, found):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    recipe = make_recipe(keep=0.9, kv_cache={"keep": 1.0})
    with pytest.raises(CheckpointError, match=r"k_proj up to rank 10, and 16 is asked .* --kv"):
        compress(model, recipe, profile=found.folder)
    assert dense(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_fused_projections_that_were_not_split_are_refused(make_model, make_recipe, make_profile):
    model = make_model("phi3")
    names = [name for name, _ in model.named_modules()]
    folder = make_profile(model).folder
    with pytest.raises(CheckpointError, match=r"such as \S+qkv_proj\.\w+; .* with --kv"):
        compress(model, make_recipe(kv_cache={"keep": 0.5}), profile=folder)
    assert [name for name, _ in model.named_modules()] == names
