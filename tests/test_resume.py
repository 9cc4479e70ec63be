"""A run that was cut off anywhere goes on to the folder that an unbroken run writes."""

import pytest
import torch

import slimrank
from interrupted import assert_same_folder, blocks_kept, cut_off, stopping
from slimrank import CompressionOptions, TokenWindows, compress
from slimrank.checkpoint.state import state_folder
from slimrank.errors import CheckpointError, NumericalWarning, RecipeError

pytestmark = pytest.mark.filterwarnings(
    "ignore:uniform ranks do better:slimrank.errors.NumericalWarning"
)
BLOCKS = 3
METHOD = {"method": "aa-svd", "refine": {"preset": "fast", "epochs": 3}}


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
    """`start(**compress)` works on `out`; `stop=k` cuts it off once k blocks are finished."""

    def begin(stop=None, model=None, recipe=None, **others):
        options = CompressionOptions(track=stopping(stop, ("compressing",)))
        values = {"out": out, "windows": text, "options": options, **others}
        return compress(
            dense if model is None else model, recipe or make_recipe(**METHOD), **values
        )

    return begin


@pytest.fixture(scope="module")
def unbroken(dense, make_recipe, text, tmp_path_factory):
    """`unbroken(**recipe)` is the folder of a run that was not cut off."""

    def make(**recipe):
        folder = tmp_path_factory.mktemp("unbroken") / "small"
        compress(dense, make_recipe(**recipe), out=folder, windows=text)
        return folder

    return make


@pytest.fixture(scope="module")
def whole(unbroken):
    return unbroken(**METHOD)


@pytest.mark.parametrize("after", range(BLOCKS))
def test_cut_off_after_any_block(after, start, whole, out):
    cut_off(start, after)
    assert not out.exists()
    assert blocks_kept(out) == after
    start(resume=True)
    assert_same_folder(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_two_passes_and_tuning_go_on_too(start, unbroken, make_recipe, out):
    """What comes before and after the blocks is made again."""
    refine = {"preset": "fast", "epochs": 2}
    values = {"method": "kfac-svd", "allocation": "global", "passes": 2, "refine": refine}
    values |= {"tune": {"epochs": 1, "learning_rate": 1e-3}}
    recipe = make_recipe(**values)
    cut_off(start, 2, recipe=recipe)
    assert blocks_kept(out) == 2
    start(recipe=recipe, resume=True)
    assert_same_folder(out, unbroken(**values))


def test_cut_off_while_the_folder_is_written(start, whole, out, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left"):
            start()
    assert blocks_kept(out) == BLOCKS
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.sequential.block.refine_block", None)  # all of it is there already
        start(resume=True)
    assert_same_folder(out, whole)


def test_cut_off_in_the_middle_of_a_training(start, whole, out, monkeypatch):
    real = slimrank.sequential.block.refine_block

    def refine(*arguments):
        report = real(*arguments)
        if arguments[4] == 1:
            raise KeyboardInterrupt
        return report

    with monkeypatch.context() as patch:
        patch.setattr("slimrank.sequential.block.refine_block", refine)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert blocks_kept(out) == 1
    start(resume=True)
    assert_same_folder(out, whole)


def test_cut_off_again_and_again(start, whole, out):
    cut_off(start, 0)
    for after in (1, 1, 2):
        cut_off(start, after, resume=True)
        assert blocks_kept(out) == after
    start(resume=True)
    assert_same_folder(out, whole)


def test_a_model_in_memory_goes_on(start, whole, out, make_model):
    """It is put back when it is cut off, so it is still the model that was begun with."""
    model = make_model("qwen2", num_hidden_layers=BLOCKS)
    cut_off(start, 2, model=model)
    start(model=model, resume=True)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, whole)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "svd-llm", "within_block": "greedy"},
        {"method": "svd", "order": "sequential"},
        {"method": "shift-aware", "keep": 0.7, "kv_cache": {"keep": 0.5}},
        {**METHOD, "dtype": "bfloat16"},
        {"method": "aa-svd", "targets": ["re:.*layers\\.[12]\\.mlp"]},
    ],
    ids=["greedy", "svd", "cache", "bfloat16", "targets"],
)
def test_other_recipes(recipe, start, unbroken, out, make_recipe):
    cut_off(start, 2, recipe=make_recipe(**recipe))
    start(recipe=make_recipe(**recipe), resume=True)
    assert_same_folder(out, unbroken(**recipe))


def test_dynamic_ranks_are_not_searched_for_again(start, unbroken, out, make_recipe, monkeypatch):
    recipe = {"method": "aa-svd", "allocation": "swift"}
    monkeypatch.setattr("slimrank.search.IMPORTANCE_WEIGHTS", (0.0, 1.0))
    cut_off(start, 1, recipe=make_recipe(**recipe))
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.making.write_profile", None)
        patch.setattr("slimrank.making.choose_ranks", None)
        report = start(recipe=make_recipe(**recipe), resume=True)
    assert len(report.allocation.trials) == 2
    assert_same_folder(out, unbroken(**recipe))


def test_finished_blocks_are_not_made_again(start, out, monkeypatch):
    cut_off(start, 2)
    trained = []
    real = slimrank.sequential.block.refine_block

    def refine(*arguments):
        trained.append(arguments[4])  # the block
        return real(*arguments)

    monkeypatch.setattr("slimrank.sequential.block.refine_block", refine)
    report = start(resume=True)
    assert trained == [2]
    assert report.seconds["resume"] > 0


def test_warnings_of_finished_blocks_are_given_again(start, make_windows, make_recipe):
    few = make_windows(1, 5)
    recipe = make_recipe(method="aa-svd")
    cut_off(start, 2, recipe=recipe, windows=few)
    with pytest.warns(NumericalWarning, match="saw 5 tokens"):
        report = start(recipe=recipe, windows=few, resume=True)
    for block in range(BLOCKS):
        assert any(x.startswith(f"model.layers.{block}.") for x in report.warnings)


def test_resume_without_a_run_starts_one(start, whole, out):
    start(resume=True)
    assert_same_folder(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_a_run_is_not_overwritten(start, out, monkeypatch):
    cut_off(start, 1)
    monkeypatch.setattr("slimrank.compression.open_dense", None)
    with pytest.raises(CheckpointError, match=r"an unfinished run is in .*; go on with --resume"):
        start()
    assert blocks_kept(out) == 1


def test_a_folder_that_is_done_is_not_gone_on_with(start, out):
    start()
    with pytest.raises(CheckpointError, match="exists already"):
        start(resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keep": 0.6}, "another recipe;"),
        ({"refine": {"preset": "fast", "seed": 1}}, "another recipe;"),
        ({"ridge": 0.02}, "another recipe;"),
        ({"dtype": "bfloat16"}, r"another recipe, model, dtype \(float32, not bfloat16\);"),
    ],
)
def test_another_recipe_is_refused(change, named, start, out, make_recipe):
    cut_off(start, 1)
    with pytest.raises(CheckpointError, match=f"begun with {named} give what") as caught:
        start(recipe=make_recipe(**METHOD | change), resume=True)
    assert "\n" not in str(caught.value)
    assert blocks_kept(out) == 1
    start(resume=True)


def test_another_model_is_refused(start, make_folder, make_model):
    cut_off(start, 1)
    other = make_folder("qwen2", num_hidden_layers=BLOCKS, seed=1)
    almost = make_model("qwen2", num_hidden_layers=BLOCKS)
    almost.model.norm.weight.data[0] += 1e-6
    for model in (other, almost):
        with pytest.raises(CheckpointError, match="begun with another model; give what"):
            start(model=model, resume=True)


@pytest.mark.parametrize("position", [0, -1], ids=["calibration", "held out"])
def test_another_text_is_refused(position, start, text):
    """The held-out windows too: a training stops by them."""
    cut_off(start, 1)
    changed = [window.clone() for window in text.windows]
    changed[position][3] = (changed[position][3] + 1) % 90
    with pytest.raises(CheckpointError, match="begun with another calibration text; give what"):
        start(windows=TokenWindows(tuple(changed)), resume=True)


def test_another_version_is_told(start, monkeypatch):
    cut_off(start, 1)
    real = slimrank.keeping.environment
    monkeypatch.setattr(
        "slimrank.keeping.environment", lambda model: real(model) | {"threads": "64"}
    )
    with pytest.warns(NumericalWarning, match=r"begun with another threads 1 -> 64; its bits may"):
        report = start(resume=True)
    assert any("threads 1 -> 64" in warning for warning in report.warnings)


def test_only_a_run_to_a_folder_is_resumed(start, make_model):
    with pytest.raises(RecipeError, match="only a run that writes a folder can be resumed"):
        start(resume=True, model=make_model("llama"), out=None)


def test_damage_is_refused(start, out):
    cut_off(start, 2)
    path = state_folder(out) / "block-0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"block-0001\.safetensors is damaged: .* delete"):
        start(resume=True)


def test_blocks_that_do_not_fit_are_refused(start, out, monkeypatch):
    cut_off(start, 1)

    def load(_self, _index):
        return {"self_attn.q_proj.weight": torch.zeros(3)}

    monkeypatch.setattr("slimrank.checkpoint.RunState.load", load)
    with pytest.raises(CheckpointError, match="block 0 of the unfinished run does not fit"):
        start(resume=True)
