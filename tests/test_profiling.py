"""A profile is written whole or not at all, and leaves the model as it was."""

import copy
import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

import slimrank
from slimrank import TokenWindows, profile
from slimrank.checkpoint.profile import HELD_OUT, MANIFEST, SEAL, SPECTRA, block_file
from slimrank.errors import (
    CheckpointError,
    CoverageWarning,
    NumericalWarning,
    RecipeError,
    TextError,
)
from slimrank.model import Anatomy, weights_fingerprint
from slimrank.planning import plan_profile
from slimrank.profile_pass import module_type

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
DiskUsage = namedtuple("DiskUsage", "total used free")


class Gated(nn.Module):
    """An MLP behind a gate of one row, for which no rank is below break-even."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.gate_row = mlp, nn.Linear(32, 1, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states) * torch.sigmoid(self.gate_row(states))


def assert_untouched(model, before):
    state, modules = before
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


def snapshot(model):
    return copy.deepcopy(model.state_dict()), {n: type(m) for n, m in model.named_modules()}


@pytest.fixture(scope="module")
def found(make_model, make_profile):
    return make_profile(make_model("llama"))


@pytest.mark.parametrize(
    ("family", "for_kv_cache"),
    [("llama", False), ("llama", True), ("phi3", True), ("qwen2_tied", False), ("mixtral", False)],
)
def test_the_model_is_left_as_it_was(make_model, make_profile, family, for_kv_cache):
    model = make_model(family)
    before = snapshot(model)
    found = make_profile(model, for_kv_cache=for_kv_cache)
    assert_untouched(model, before)
    assert found.manifest.for_kv_cache == for_kv_cache
    assert found.manifest.model_fingerprint == weights_fingerprint(model)


def test_what_it_is_of(found, calibration_part, windows):
    manifest = found.manifest
    held_out = TokenWindows(windows.windows[4:])
    assert manifest.calibration_fingerprint == calibration_part.fingerprint()
    assert manifest.held_out_fingerprint == held_out.fingerprint()
    assert found.held_out().fingerprint() == held_out.fingerprint()
    assert manifest.tokens == calibration_part.tokens == 96
    assert (manifest.method, manifest.dtype) == ("swift-svd", "float32")
    assert {"calibrate", "solve", "check", "write"} <= manifest.seconds.keys()
    for linear in manifest.linears:
        assert linear.block == int(linear.name.split(".")[2])
        assert linear.kind == linear.name.split(".", 3)[3]
        assert linear.tokens == 96
        assert linear.token_check < 1e-4
        assert linear.energy == pytest.approx(float(found.spectra[linear.name].square().sum()))


def test_the_manifest_lists_the_files(found):
    blocks = {block_file(0), block_file(1)}
    assert found.manifest.files.keys() == {SPECTRA, HELD_OUT} | blocks
    on_disk = {path.name for path in found.folder.iterdir()}
    assert on_disk == found.manifest.files.keys() | {MANIFEST, SEAL}


def test_one_window_is_all_calibrated_on(make_model, make_recipe, make_profile, make_windows):
    for count, recipe in (
        (1, make_recipe()),
        (4, make_recipe(calibration={"held_out_sequences": 0})),
    ):
        windows = make_windows(count, 96 // count)
        found = make_profile(make_model("llama"), recipe, windows=windows)
        assert found.held_out() is None
        assert found.manifest.held_out_fingerprint == ""
        assert found.manifest.calibration_fingerprint == windows.fingerprint()


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16")])
def test_measured_is_predicted_at_every_rank(make_model, make_profile, family, dtype):
    found = make_profile(make_model(family, dtype=getattr(torch, dtype)), for_kv_cache=True)
    for linear in found.manifest.linears:
        squares = found.spectra[linear.name].square()
        energy = squares.sum()
        tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        measured = found.measured[linear.name]
        assert len(measured) == linear.stored_rank + 1
        gaps = (measured - tail[: linear.stored_rank + 1]).abs()
        assert float(gaps.max()) <= 1e-10 * float(energy), linear.name


@pytest.mark.parametrize("for_kv_cache", [False, True])
def test_the_bases_go_to_break_even_or_all_the_way(make_model, make_profile, for_kv_cache):
    found = make_profile(make_model("llama"), for_kv_cache=for_kv_cache)
    ranks = {x.name.rsplit(".", 1)[1]: x.stored_rank for x in found.manifest.linears}
    whole = 16 if for_kv_cache else 10  # of 16 x 32
    square = {"q_proj": 15, "o_proj": 15, "gate_proj": 19, "up_proj": 19, "down_proj": 19}
    assert ranks == {"k_proj": whole, "v_proj": whole, **square}


def test_a_row_has_no_useful_rank(make_model, make_profile, make_recipe):
    model = make_model("llama")
    for block in model.model.layers:
        block.mlp = Gated(block.mlp)
    found = make_profile(model)
    rows = [x for x in found.manifest.linears if x.name.endswith("gate_row")]
    assert [(x.stored_rank, x.token_check) for x in rows] == [(0, None)] * 2
    report = slimrank.compress(model, make_recipe(), profile=found.folder)
    assert [x.rank for x in report.linears if x.name.endswith("gate_row")] == [None] * 2


def test_warnings_given_before_the_pass_are_kept(make_model, make_profile):
    with pytest.warns(CoverageWarning, match="fused tensors stay dense") as caught:
        found = make_profile(make_model("mixtral"))
    assert len([w for w in found.manifest.warnings if "fused tensors" in w]) == 1
    assert len([w for w in caught if issubclass(w.category, CoverageWarning)]) == 1


def test_an_expert_without_tokens(make_experts_model, make_profile):
    with pytest.warns(NumericalWarning, match="saw 0 tokens"):
        found = make_profile(make_experts_model(closed=(2,)))
    silent = [x for x in found.manifest.linears if ".experts.2." in x.name]
    assert len(silent) == 6
    assert all((x.tokens, x.energy, x.token_check) == (0, 0.0, None) for x in silent)
    assert {x.kind for x in silent} == {f"mlp.experts.*.{p}_proj" for p in ("gate", "up", "down")}
    assert any("experts.2.up_proj saw 0 tokens" in text for text in found.manifest.warnings)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_bits_twice(make_model, make_profile, family):
    first, second = (make_profile(make_model(family)) for _ in range(2))
    assert first.manifest.files == second.manifest.files
    assert first.manifest.importance == second.manifest.importance


@pytest.mark.parametrize("spectra_only", [False, True])
@pytest.mark.parametrize("for_kv_cache", [False, True])
def test_disk_use_is_what_was_said(
    dense_folder, make_model, make_recipe, make_profile, spectra_only, for_kv_cache
):
    found = make_profile(make_model("llama"), for_kv_cache=for_kv_cache, spectra_only=spectra_only)
    said = plan_profile(dense_folder, make_recipe(), for_kv_cache, spectra_only)
    tensors = [p for p in found.folder.glob("*.safetensors") if p.name != HELD_OUT]
    written = sum(path.stat().st_size for path in tensors)
    headers = 160 * 3 * len(found.manifest.linears) + 16 * len(tensors)
    assert said <= written <= said + headers
    if not (spectra_only or for_kv_cache):
        assert slimrank.plan(dense_folder, make_recipe()).profile_bytes == said


def test_predicted_changes_are_counted(dense_folder, make_model, make_recipe, make_profile):
    recipe = make_recipe(allocation="threshold")
    more, less = (plan_profile(dense_folder, r) for r in (recipe, make_recipe()))
    found = make_profile(make_model("llama"), recipe)
    assert more - less == 8 * sum(len(changes) for changes in found.changes.values()) > 0


def test_a_full_disk_is_told_before_any_work(make_model, make_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: DiskUsage(10**9, 10**9 - 10, 10))
    monkeypatch.setattr("slimrank.profile_pass.pass_blocks", None)
    with pytest.raises(CheckpointError, match=r"takes 0\.00 GB .* has 0\.00 GB left; make room"):
        profile(
            make_model("llama"),
            slimrank.CompressionRecipe(budget={"param_ratio": 1.0}),
            tmp_path / "out",
            windows=TokenWindows((torch.arange(90),)),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_if_no_block_was_finished(
    make_model, make_recipe, windows, tmp_path, monkeypatch, error
):
    def write(*arguments):
        raise error

    monkeypatch.setattr("slimrank.profile_pass.write_tensors", write)
    model = make_model("phi3")
    before = snapshot(model)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        profile(model, make_recipe(), tmp_path / "out", windows=windows, for_kv_cache=True)
    assert list(tmp_path.iterdir()) == []
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_out_exists(make_model, make_recipe, windows, tmp_path, kind):
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        profile(make_model("llama"), make_recipe(), out, windows=windows)
    assert out.is_file() == (kind == "file")


def test_what_cannot_be_profiled(make_model, make_recipe, windows, tmp_path):
    out, model = tmp_path / "out", make_model("llama")
    with pytest.raises(RecipeError, match="svd looks at no moments of activations"):
        profile(model, make_recipe(method="svd"), out, windows=windows)
    for method in ("aa-svd", "shift-aware"):
        with pytest.raises(RecipeError, match=rf"{method} looks at what arrives .* by swift-svd"):
            profile(model, make_recipe(method=method), out, windows=windows)
    with pytest.raises(RecipeError, match=r"needs tokenizer=\.\.\. or windows"):
        profile(model, make_recipe(), out)
    with pytest.raises(RecipeError, match="q_prjo"):
        profile(model, make_recipe(targets=["q_prjo"]), out, windows=windows)
    with pytest.raises(TextError, match="token id 96 is outside"):
        profile(model, make_recipe(), out, windows=TokenWindows((torch.tensor([5, 96]),)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.12.w1", "mlp.experts.*.w1"),
        ("model.layers.0.mlp.fc1", "mlp.fc1"),
    ],
)
def test_module_types(name, expected):
    assert module_type(name, Anatomy("model.layers", (), None)) == expected
