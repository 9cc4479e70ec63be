"""Processes that share a run give what one gives, to rounding, and all of them the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimrank
from interrupted import blocks_kept, stopping
from slimrank import CompressionOptions, TokenWindows, processes
from slimrank.checkpoint import RunState, state_folder
from slimrank.errors import CheckpointError, NumericalWarning, TextError
from tiny.together import ended_together, run_together

RECIPES = {
    "default": {"effort": "balanced"},
    "swift, searched": {"method": "swift-svd", "allocation": "swift"},
    "one held out, greedy, refined": {
        "method": "aa-svd",
        "within_block": "greedy",
        "refine": {"preset": "fast", "epochs": 2},
    },
    "refined in the gradients' metric": {
        "method": "kfac-aa-svd",
        "refine": {"preset": "fast", "epochs": 1, "loss": "gradient"},
    },
    "rows, drawn labels": {"method": "fwsvd", "gradients": {"labels": "model"}},
    "magnitudes, mean gradients": {"method": "asvd", "allocation": "threshold"},
    "all at once": {
        "effort": "balanced",
        "passes": 2,
        "generated_sequences": 3,
        "tune": {"epochs": 1},
    },
}
BY_THREE = ("one held out, greedy, refined", "all at once")
ROUNDING = 1e-4  # of the largest entry: float32 moments in another order, through solves


@pytest.fixture(scope="module")
def made(make_model, make_recipe, make_windows, tmp_path_factory):
    """`made(name, count)` gives weights and report of each process; all recipes are run at once."""
    lengths, known = (24, 17, 24, 24, 30, 24, 24), {}
    windows = TokenWindows(
        tuple(make_windows(1, n, seed=seed).windows[0] for seed, n in enumerate(lengths))
    )

    def run(count):
        folder = tmp_path_factory.mktemp(f"of {count}")

        def do(number):
            for place, (name, values) in enumerate(RECIPES.items()):
                if count == 3 and name not in BY_THREE:
                    continue
                recipe = make_recipe(keep=0.6, **values)
                sample = recipe.calibration.model_copy(update={"held_out_sequences": 1})
                recipe = recipe.model_copy(update={"calibration": sample})
                model = make_model("llama")
                how = CompressionOptions(batch_size=4)
                report = slimrank.compress(model, recipe, windows=windows, options=how)
                tensors = {name: t.clone() for name, t in model.state_dict().items()}
                save_file(tensors, folder / f"{place} of {number}.safetensors")
                (folder / f"{place} of {number}.json").write_text(report.model_dump_json())

        run_together(count, folder / "meeting", do)
        return folder

    def give(name, count):
        if count not in known:
            known[count] = run(count)
        place = list(RECIPES).index(name)
        paths = [known[count] / f"{place} of {number}" for number in range(count)]
        weights = [load_file(path.with_suffix(".safetensors")) for path in paths]
        return weights, [json.loads(path.with_suffix(".json").read_text()) for path in paths]

    return give


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        if tensor.is_floating_point():
            size = tensor.abs().max() if tensor.numel() else 0.0
            assert (found[name] - tensor).abs().le(ROUNDING * size).all(), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("name", "count"), [*((name, 2) for name in RECIPES), *((name, 3) for name in BY_THREE)]
)
def test_ranks_and_weights_are_those_of_one_process(made, name, count):
    (expected,), (alone,) = made(name, 1)
    weights, reports = made(name, count)
    for own in weights:
        assert_close(own, expected)
        assert all(torch.equal(own[key], weights[0][key]) for key in own)
    assert alone["environment"]["processes"] == "1"
    for report in reports:
        assert report["environment"]["processes"] == str(count)
        assert report["tokens"] == alone["tokens"]
        assert [x["rank"] for x in report["linears"]] == [x["rank"] for x in alone["linears"]]
        for one, other in zip(report["linears"], alone["linears"], strict=True):
            assert one["tokens"] == other["tokens"]
            assert one["measured_loss"] == pytest.approx(other["measured_loss"], rel=1e-4)
            assert (one["token_check"] is None) == (other["token_check"] is None)
        for one, other in zip(report["blocks"], alone["blocks"], strict=True):
            for text in ("calibration", "held_out"):
                assert one[text] == pytest.approx(other[text], rel=1e-3)
            if one["refinement"]:
                wanted = pytest.approx(other["refinement"]["start_loss"], rel=1e-3)
                assert one["refinement"]["start_loss"] == wanted


@pytest.mark.filterwarnings("ignore:.*fewer than its rank:slimrank.errors.NumericalWarning")
def test_experts_that_some_processes_never_see(
    make_experts_model, make_recipe, make_windows, tmp_path
):
    recipe, windows = make_recipe(method="swift-svd"), make_windows(3, length=1)  # two of four

    def do(number):
        model = make_experts_model()
        report = slimrank.compress(model, recipe, windows=windows)
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
        save_file(tensors, tmp_path / f"{processes.count()} {number}.safetensors")
        seen = [linear.tokens for linear in report.linears if "experts" in linear.name]
        assert len(seen) == 2 * 3 * 4
        assert sum(seen) == 3 * 2 * 2 * windows.tokens

    run_together(1, tmp_path / "alone", do)
    run_together(3, tmp_path / "together", do)
    expected = load_file(tmp_path / "1 0.safetensors")
    for number in range(3):
        assert_close(load_file(tmp_path / f"3 {number}.safetensors"), expected)


def test_a_profile_is_the_same(make_folder, make_recipe, tmp_path):
    folder, recipe = make_folder("llama"), make_recipe(method="kfac-svd")
    alone = slimrank.profile(folder, recipe, tmp_path / "alone")

    def do(_number):
        slimrank.profile(folder, recipe, tmp_path / "together")

    run_together(2, tmp_path / "meeting", do)
    together = slimrank.read_profile(tmp_path / "together")
    assert not state_folder(tmp_path / "together").exists()
    assert together.linears.keys() == alone.linears.keys()
    for name, entry in alone.linears.items():
        other = together.linears[name]
        assert (other.stored_rank, other.tokens) == (entry.stored_rank, entry.tokens)
        assert other.energy == pytest.approx(entry.energy, rel=1e-5)
    weights = [tmp_path / way / "spectra.safetensors" for way in ("alone", "together")]
    expected, found = map(load_file, weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5 * float(tensor.max()))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_run_goes_on_with_another_number_of_processes(
    make_folder, make_recipe, tmp_path, before, after, order
):
    method = {"one-shot": "swift-svd", "sequential": "aa-svd"}[order]
    folder, recipe = make_folder("llama"), make_recipe(method=method)
    slimrank.compress(folder, recipe, out=tmp_path / "unbroken")
    out = tmp_path / "out"

    def cut_off(_number):
        options = CompressionOptions(track=stopping(1))
        slimrank.compress(folder, recipe, out=out, options=options)

    def go_on(number):
        with pytest.warns(NumericalWarning, match=f"processes {before} -> {after}"):
            report = slimrank.compress(folder, recipe, out=out, resume=True)
        (tmp_path / f"report {number}").write_text(report.model_dump_json())

    codes, told = ended_together(before, tmp_path / "before", cut_off)
    assert codes == [1] * before
    assert "CutOff" in told
    assert not out.exists()
    run_together(after, tmp_path / "after", go_on)
    assert not state_folder(out).exists()
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "unbroken").iterdir()
    }
    name = "model.safetensors"
    assert_close(load_file(out / name), load_file(tmp_path / "unbroken" / name))
    reports = {(tmp_path / f"report {number}").read_text() for number in range(after)}
    assert reports == {(slimrank.checkpoint.read_report(out)).model_dump_json()}


def test_one_process_that_dies_ends_all_and_nothing_is_lost(make_folder, make_recipe, tmp_path):
    folder, recipe, out = make_folder("llama"), make_recipe(method="swift-svd"), tmp_path / "out"

    def do(number):
        def track(steps, _what):
            for step in steps:
                if (number, step) == (1, 1):
                    os._exit(9)
                yield step

        slimrank.compress(folder, recipe, out=out, options=CompressionOptions(track=track))

    codes, told = ended_together(2, tmp_path / "meeting", do)
    assert codes == [1, 9]
    assert "slimrank.errors.ProcessError: another process has ended" in told
    assert not out.exists()
    with pytest.warns(NumericalWarning, match="processes 2 -> 1"):
        slimrank.compress(folder, recipe, out=out, resume=True)
    assert slimrank.load(out)


def test_an_error_of_one_process_leaves_nothing(make_folder, make_recipe, tmp_path):
    folder, recipe, out = make_folder("llama"), make_recipe(method="swift-svd"), tmp_path / "out"
    out.mkdir()

    def do(_number):
        slimrank.compress(folder, recipe, out=out)

    codes, told = ended_together(2, tmp_path / "meeting", do)
    assert codes == [1, 1]
    assert "out exists already; name a folder that does not" in told
    assert not state_folder(out).exists()
    assert not list(out.iterdir())


def test_the_first_block_is_kept_though_another_process_dies_meanwhile(
    make_folder, make_recipe, tmp_path, monkeypatch
):
    folder, recipe, out = make_folder("llama"), make_recipe(method="swift-svd"), tmp_path / "out"

    def do(number):
        if number == 1:
            monkeypatch.setattr(RunState, "save", lambda *_a, **_k: os._exit(9))
        slimrank.compress(folder, recipe, out=out)

    codes, _ = ended_together(2, tmp_path / "meeting", do)
    assert codes == [1, 9]
    assert blocks_kept(out) == 1


def test_a_profile_of_which_only_the_end_was_left_goes_on(
    make_folder, make_recipe, tmp_path, monkeypatch
):
    folder, recipe, out = make_folder("llama"), make_recipe(method="swift-svd"), tmp_path / "out"

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(slimrank.profiling, "write_manifest", fail)
        with pytest.raises(CheckpointError, match="go on with"):
            slimrank.profile(folder, recipe, out)

    def go_on(_number):
        with pytest.warns(NumericalWarning, match="processes 1 -> 2"):
            assert slimrank.profile(folder, recipe, out, resume=True).linears

    run_together(2, tmp_path / "meeting", go_on)
    assert not state_folder(out).exists()


def test_streamed_weights_are_shared_too(make_folder, make_recipe, tmp_path):
    folder, recipe = make_folder("llama"), make_recipe(method="swift-svd")
    slimrank.compress(folder, recipe, out=tmp_path / "alone")
    how = CompressionOptions(stream=True, memory=0)

    def do(_number):
        slimrank.compress(folder, recipe, out=tmp_path / "out", options=how)

    run_together(2, tmp_path / "meeting", do)
    names = [tmp_path / name / "model.safetensors" for name in ("out", "alone")]
    assert_close(*map(load_file, names))
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "out", "meeting"}


def test_other_windows_than_the_first_ones_are_refused(make_model, make_recipe, windows, tmp_path):
    own = [TokenWindows(windows.windows[n::2]) for n in (0, 1)]

    def do(number):
        slimrank.compress(make_model("llama"), make_recipe(method="swift-svd"), windows=own[number])

    codes, told = ended_together(2, tmp_path, do)
    assert codes == [1, 1]
    assert "this process has another text than the first one; give all the same" in told


def test_another_model_than_the_first_ones_is_refused(make_folder, make_recipe, tmp_path):
    folders = [make_folder("llama", seed=seed) for seed in (0, 1)]

    def do(number):
        recipe = make_recipe(method="swift-svd")
        slimrank.compress(folders[number], recipe, out=tmp_path / "out")

    codes, told = ended_together(2, tmp_path / "meeting", do)
    assert codes == [1, 1]
    assert "this process has another model than the first one; give all the same" in told
    assert {path.name for path in tmp_path.iterdir()} == {"meeting"}


def test_fewer_sequences_than_processes_are_refused(
    make_model, make_recipe, make_windows, tmp_path
):
    def do(_number):
        with pytest.raises(TextError, match="3 processes cannot share 2 sequences; start fewer"):
            slimrank.compress(make_model("llama"), make_recipe(), windows=make_windows(2))

    run_together(3, tmp_path, do)


def test_torchrun_starts_the_command(make_folder, text_file, tmp_path):
    folder, out = make_folder("llama"), tmp_path / "out"
    text = ["--calibration", text_file, "--num-sequences", "4", "--sequence-length", "32"]
    how = ["--keep", "0.5", "--method", "swift-svd"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "slimrank", "compress", folder, out, *how, *text, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["environment"]["processes"] == "2"
    assert done.stderr.count("compressing") == 1
    assert slimrank.load(out)
