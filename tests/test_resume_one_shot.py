"""A run in one-shot order that was cut off anywhere goes on to the folder of an unbroken one."""

import shutil

import pytest
import torch

import slimrank
from interrupted import assert_same_folder, blocks_kept, cut_off, stopping
from slimrank import CompressionOptions, TokenWindows, compress
from slimrank.checkpoint import state_folder
from slimrank.errors import (
    BudgetError,
    CheckpointError,
    NumericalError,
    NumericalWarning,
    RecipeError,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:uniform ranks do better:slimrank.errors.NumericalWarning"
)
BLOCKS = 3
UNIFORM = {"method": "swift-svd", "layout": "auto"}
DEFAULT = {"effort": "balanced", "layout": "auto"}


@pytest.fixture(scope="module")
def text(make_windows):
    return make_windows(12, 24)


@pytest.fixture(scope="module")
def dense(make_folder):
    return make_folder("qwen2", num_hidden_layers=BLOCKS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "small"


@pytest.fixture
def start(dense, make_recipe, text, out):
    """`start(recipe)` works on `out`; `stop=k` cuts it off in front of block k."""

    def begin(
        recipe=None, model=None, stop=None, phases=("compressing", "building"), turn=1, **others
    ):
        options = CompressionOptions(track=stopping(stop, phases, turn))
        values = {"out": out, "windows": text, "options": options, **others}
        recipe = make_recipe(**(UNIFORM if recipe is None else recipe))
        return compress(dense if model is None else model, recipe, **values)

    return begin


@pytest.fixture(scope="module")
def unbroken(dense, make_recipe, text, tmp_path_factory):
    """`unbroken(model=..., **recipe)` is the folder of a run that was not cut off."""
    known = {}

    def make(model=None, **recipe):
        key = (model, repr(recipe))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("unbroken") / "small"
            compress(model or dense, make_recipe(**recipe), out=known[key], windows=text)
        return known[key]

    return make


def assert_alone(out):
    assert [path.name for path in out.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("after", range(BLOCKS))
@pytest.mark.parametrize("recipe", [UNIFORM, DEFAULT], ids=["uniform", "default"])
def test_cut_off_after_any_block(recipe, after, start, unbroken, out):
    cut_off(start, after, recipe=recipe)
    assert not out.exists()
    assert blocks_kept(out) == after
    start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))
    assert_alone(out)


@pytest.mark.parametrize("after", range(BLOCKS))
def test_cut_off_while_the_spectra_are_taken(after, start, unbroken, out, monkeypatch):
    """Most of a run with ranks by spectra is done before any rank is known."""
    cut_off(start, after, recipe=DEFAULT, phases=("profiling",))
    assert state_folder(out).exists() == (after > 0)
    solved = []
    real = slimrank.profile_pass.solve
    monkeypatch.setattr(
        "slimrank.profile_pass.solve",
        lambda model, site, *others: solved.append(site.block) or real(model, site, *others),
    )
    start(DEFAULT, resume=True)
    assert sorted(set(solved)) == list(range(after, BLOCKS))
    assert_same_folder(out, unbroken(**DEFAULT))
    assert_alone(out)


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "kfac-svd"},
        {"method": "svd-llm", "allocation": "global", "kv_cache": {"keep": 0.5}},
        {"method": "asvd", "allocation": "global", "layout": "auto"},
        {"method": "svd", "allocation": "global"},
        {"method": "swift-svd", "allocation": "swift", "dtype": "bfloat16"},
        {"method": "swift-svd", "allocation": "threshold"},
        {"method": "swift-svd", "targets": ["re:.*layers\\.1\\.mlp"]},
        {**DEFAULT, "targets": ["re:.*layers\\.[12]\\.mlp"]},
        {"method": "aa-svd", "order": "one-shot"},
    ],
    ids=["gradients", "cache", "magnitudes", "svd", "swift", "threshold", "one", "two", "aa"],
)
def test_other_recipes(recipe, start, unbroken, out, monkeypatch):
    monkeypatch.setattr("slimrank.search.IMPORTANCE_WEIGHTS", (0.0, 1.0))
    cut_off(start, 1, recipe=recipe)
    start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))
    assert_alone(out)


@pytest.mark.parametrize("family", ["qwen2_tied", "falcon", "phi3", "mixtral", "opt"])
@pytest.mark.parametrize("recipe", [UNIFORM, DEFAULT], ids=["uniform", "default"])
@pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
@pytest.mark.filterwarnings("ignore:.*saw .* tokens:slimrank.errors.NumericalWarning")
def test_other_models(family, recipe, start, unbroken, out, make_folder):
    model = make_folder(family)
    recipe = {**recipe, "kv_cache": {"keep": 0.5}} if family == "phi3" else recipe
    cut_off(start, 1, recipe=recipe, model=model)
    start(recipe, model=model, resume=True)
    assert_same_folder(out, unbroken(model, **recipe))


def test_two_passes_and_training_go_on_too(start, unbroken, out):
    """What comes before and after the blocks is made again."""
    recipe = {**DEFAULT, "passes": 2, "tune": {"epochs": 1, "learning_rate": 1e-3}}
    cut_off(start, 1, recipe=recipe)  # in the first pass, which makes a copy
    assert list(out.parent.iterdir()) == []
    cut_off(start, 2, recipe=recipe, turn=2)
    assert blocks_kept(out) == 2
    start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))
    assert_alone(out)


def test_training_begins_anew(start, unbroken, out, monkeypatch):
    recipe = {**UNIFORM, "tune": {"epochs": 1, "learning_rate": 1e-3}}

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slimrank.tuning.refine_block", stop)
        with pytest.raises(KeyboardInterrupt):
            start(recipe)
    assert blocks_kept(out) == BLOCKS
    start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))


@pytest.mark.parametrize("recipe", [UNIFORM, DEFAULT], ids=["uniform", "default"])
def test_cut_off_while_the_folder_is_written(recipe, start, unbroken, out, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left"):
            start(recipe)
    assert blocks_kept(out) == BLOCKS
    assert [path.name for path in out.parent.iterdir()] == [".small.unfinished"]
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.blockwise.solve", None)  # all of it is there already
        patch.setattr("slimrank.blockwise.collect_moments", None)
        patch.setattr("slimrank.making.write_profile", None)
        patch.setattr("slimrank.making.choose_ranks", None)
        start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))


def test_cut_off_when_only_the_state_is_left(start, unbroken, out, make_folder):
    """The folder has its name, and the process is killed before the state is removed."""
    cut_off(start, 2)
    shutil.copytree(state_folder(out), out.parent / "kept")
    start(resume=True)
    shutil.move(out.parent / "kept", state_folder(out))
    with pytest.raises(CheckpointError, match="exists already"):
        start()
    with pytest.raises(CheckpointError, match="exists already"):
        start({**UNIFORM, "keep": 0.4}, resume=True)
    other = make_folder("qwen2", num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(CheckpointError, match="exists already"):
        start(model=other, resume=True)
    report = start(resume=True)
    assert report.linears
    assert_same_folder(out, unbroken(**UNIFORM))
    assert_alone(out)


def test_a_folder_of_another_recipe_is_not_taken_for_the_run(start, out, unbroken):
    cut_off(start, 2)
    shutil.copytree(unbroken(**DEFAULT), out)
    with pytest.raises(CheckpointError, match="exists already"):
        start(resume=True)
    assert blocks_kept(out) == 2


def test_finished_blocks_are_not_solved_again(start, out, monkeypatch):
    cut_off(start, 2)
    solved, seen = [], []
    real, moments = slimrank.blockwise.solve, slimrank.blockwise.collect_moments

    def solve(model, site, *others):
        solved.append(site.block)
        return real(model, site, *others)

    def collect(model, block, index, groups, *others):
        seen.append((index, len(groups) > 0))
        return moments(model, block, index, groups, *others)

    monkeypatch.setattr("slimrank.blockwise.solve", solve)
    monkeypatch.setattr("slimrank.blockwise.collect_moments", collect)
    report = start(resume=True)
    assert set(solved) == {2}
    assert seen == [(0, False), (1, False), (2, True)]
    assert report.seconds["resume"] > 0


def test_a_model_in_memory_goes_on(start, unbroken, out, make_model):
    """It is put back when it is cut off, so it is still the model that was begun with."""
    model = make_model("qwen2", num_hidden_layers=BLOCKS)
    cut_off(start, 2, model=model)
    start(model=model, resume=True)
    weights = [(x / "model.safetensors").read_bytes() for x in (out, unbroken(**UNIFORM))]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("recipe", [UNIFORM, DEFAULT], ids=["uniform", "default"])
def test_warnings_of_finished_blocks_are_given_again(recipe, start, make_windows):
    few = make_windows(2, 3)
    cut_off(start, 2, recipe=recipe, windows=few)
    with pytest.warns(NumericalWarning, match=r"saw \d tokens"):
        report = start(recipe, windows=few, resume=True)
    for block in range(BLOCKS):
        assert any(x.startswith(f"model.layers.{block}.") for x in report.warnings)


@pytest.mark.parametrize("others", [{"batch_size": 3}, {"memory": 1000}], ids=str)
def test_other_options_are_fine(others, start, unbroken, out):
    """The batch size changes the order of sums, as it does in an unbroken run."""
    cut_off(start, 2, recipe=DEFAULT, phases=("profiling",))
    start(DEFAULT, resume=True, options=CompressionOptions(**others))
    assert (out / "model.safetensors").exists()
    if "memory" in others:
        assert_same_folder(out, unbroken(**DEFAULT))
    assert_alone(out)


def test_resume_without_a_run_starts_one(start, unbroken, out):
    start(DEFAULT, resume=True)
    assert_same_folder(out, unbroken(**DEFAULT))
    assert_alone(out)


@pytest.mark.parametrize("recipe", [UNIFORM, {"method": "svd"}], ids=["calibrated", "svd"])
def test_a_run_is_not_overwritten(recipe, start, out, monkeypatch):
    cut_off(start, 1)
    monkeypatch.setattr("slimrank.compression.open_dense", None)
    with pytest.raises(CheckpointError, match=r"an unfinished run is in .*; go on with --resume"):
        start(recipe)
    assert blocks_kept(out) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 0.6}, "another recipe;"),
        ({"allocation": "global"}, "another recipe;"),
        ({"dtype": "bfloat16"}, r"another recipe, model, dtype \(float32, not bfloat16\);"),
    ],
)
def test_another_recipe_is_refused(change, named, start, out):
    cut_off(start, 1)
    with pytest.raises(CheckpointError, match=f"begun with {named} give what") as caught:
        start(UNIFORM | change, resume=True)
    assert "\n" not in str(caught.value)
    assert blocks_kept(out) == 1
    start(resume=True)


def test_another_model_or_text_is_refused(start, make_folder, text):
    cut_off(start, 1)
    other = make_folder("qwen2", num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(CheckpointError, match="begun with another model; give what"):
        start(model=other, resume=True)
    changed = [window.clone() for window in text.windows]
    changed[0][3] = (changed[0][3] + 1) % 90
    with pytest.raises(CheckpointError, match="begun with another calibration text; give what"):
        start(windows=TokenWindows(tuple(changed)), resume=True)


def test_other_generated_sequences_are_refused(start, unbroken, out, monkeypatch):
    recipe = {**UNIFORM, "generated_sequences": 2}
    real = slimrank.making.generate_windows

    def elsewhere(*arguments):
        windows = [window.clone() for window in real(*arguments).windows]
        windows[0][-1] = (windows[0][-1] + 1) % 90
        return TokenWindows(tuple(windows))

    cut_off(start, 1, recipe=recipe)
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.making.generate_windows", elsewhere)
        with pytest.raises(CheckpointError, match=r"other generated sequences; go on where") as e:
            start(recipe, resume=True)
    assert "\n" not in str(e.value)
    assert blocks_kept(out) == 1
    start(recipe, resume=True)
    assert_same_folder(out, unbroken(**recipe))


def test_a_run_of_the_other_order_is_refused(start):
    cut_off(start, 1)
    with pytest.raises(CheckpointError, match="begun with another recipe; give what"):
        start(UNIFORM | {"order": "sequential"}, resume=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_damaged_blocks_are_refused(start, out):
    cut_off(start, 2)
    flip(state_folder(out) / "block-0001.safetensors")
    with pytest.raises(CheckpointError, match=r"block-0001\.safetensors is damaged: .* delete"):
        start(resume=True)


def test_a_damaged_profile_is_refused(start, out):
    cut_off(start, 1, recipe=DEFAULT)
    profile = state_folder(out) / "profile"
    flip(profile / "spectra.safetensors")
    with pytest.raises(CheckpointError, match=r"spectra\.safetensors is damaged: .* delete .*unf"):
        start(DEFAULT, resume=True)
    shutil.rmtree(profile)
    with pytest.raises(CheckpointError, match=r"profile is missing; delete .*unfinished"):
        start(DEFAULT, resume=True)


def test_blocks_that_do_not_fit_are_refused(start, monkeypatch):
    cut_off(start, 1)
    monkeypatch.setattr(
        "slimrank.checkpoint.RunState.load", lambda *_: {"self_attn.q_proj.weight": torch.zeros(3)}
    )
    with pytest.raises(CheckpointError, match="block 0 of the unfinished run does not fit"):
        start(resume=True)


def test_what_fails_at_once_leaves_nothing(start, out, make_model):
    with pytest.raises(BudgetError):
        start({"keep": 0.001})
    model = make_model("qwen2", num_hidden_layers=BLOCKS)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    for recipe in (UNIFORM, DEFAULT):
        with pytest.raises(NumericalError):
            start(recipe, model=model)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("recipe", [{"method": "svd"}, UNIFORM], ids=["svd", "profile"])
def test_short_runs_keep_nothing(recipe, start, out, dense, make_profile, make_model):
    others = {}
    if recipe is UNIFORM:
        model = make_model("qwen2", num_hidden_layers=BLOCKS)
        others = {"profile": make_profile(model).folder, "windows": None}
    with pytest.raises(RecipeError, match=r"keeps nothing to go on with; leave --resume out"):
        start(recipe, resume=True, **others)
    cut_off(start, 1, recipe=recipe, **others)
    assert list(out.parent.iterdir()) == []


def test_passing_files_of_a_killed_run_are_removed(start, unbroken, out):
    cut_off(start, 1, recipe=DEFAULT)
    for name in (".small.partial-x", ".slimrank-activations-x", ".slimrank-x"):
        (state_folder(out) / name).mkdir()
        (state_folder(out) / name / "file").write_bytes(b"half")
    cut_off(start, 2, recipe=DEFAULT, resume=True)
    assert not list(state_folder(out).glob(".*"))
    start(DEFAULT, resume=True)
    assert_alone(out)
