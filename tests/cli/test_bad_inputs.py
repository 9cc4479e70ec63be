"""Every bad input gets one clear line, exit code 1, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slimrank
from slimrank.checkpoint import RunState
from slimrank.cli import app

runner = CliRunner()
SMALL = ["--effort", "fast", "--num-sequences", "4", "--sequence-length", "32"]


@pytest.fixture
def model(dense_folder: Path, tmp_path: Path) -> Path:
    """A dense folder that a test may spoil."""
    return Path(shutil.copytree(dense_folder, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog ran to the tree . " * 200)
    return path


def fails(*arguments: object) -> str:
    """Run, expect exit code 1, and give the one line on stderr."""
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


def left_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_no_such_folder(tmp_path):
    line = fails("compress", tmp_path / "nowhere", tmp_path / "out", "--keep", 0.8)
    assert "no such model folder" in line
    assert left_in(tmp_path) == set()


def test_folder_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails("plan", tmp_path / "empty", "--keep", 0.8)


def test_no_such_gguf(tmp_path):
    assert "no such GGUF" in fails("plan", tmp_path / "m.gguf", "--keep", 0.8)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_not_a_causal_language_model(tmp_path, command):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16}))
    out = [tmp_path / "out"] if command == "compress" else []
    assert "no causal language model" in fails(command, folder, *out, "--keep", 0.8)


def test_unknown_recipe_key(model, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("budget: {param_ratio: 0.8}\ncalibrashun: {}\n")
    line = fails("compress", model, tmp_path / "out", "--recipe", recipe)
    assert "calibrashun" in line
    assert "calibration" in line
    recipe.write_text("budget: {param_ratio: 0.8, sope: model}\n")
    line = fails("plan", model, "--recipe", recipe)
    assert "budget.sope" in line
    assert "scope" in line


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "budget: 3"])
def test_recipe_that_is_none(model, tmp_path, content):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    assert str(recipe) in fails("plan", model, "--recipe", recipe)


def test_missing_recipe(model, tmp_path):
    assert "cannot read the recipe" in fails("plan", model, "--recipe", tmp_path / "r.yaml")


@pytest.mark.parametrize("keep", [0, 1.2, -0.5, "nan"])
def test_keep_out_of_range(model, tmp_path, keep):
    line = fails("compress", model, tmp_path / "out", f"--keep={keep}")
    assert "(0, 1]" in line
    assert not (tmp_path / "out").exists()


def test_keep_below_one_rank(model):
    line = fails("plan", model, "--keep", 0.001)
    assert "smallest share that works" in line
    works = line.rsplit(" ", 1)[-1]
    assert runner.invoke(app, ["plan", str(model), "--keep", works]).exit_code == 0


def test_keep_missing(model):
    assert "param_ratio" in fails("plan", model)


def test_model_scope_below_what_stays(model):
    line = fails("plan", model, "--keep", 0.05, "--scope", "model")
    assert "embeddings" in line


def test_unknown_method(model):
    assert "did you mean 'swift-svd'" in fails("plan", model, "--keep", 0.8, "--method", "swiftsvd")


def test_empty_text(model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", empty)
    assert "empty" in line
    assert "empty" in fails("evaluate", model, "--text", empty)


def test_text_shorter_than_one_sequence(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", short)
    assert "fewer than one sequence" in line
    assert "fewer than one window" in fails("evaluate", model, "--text", short)
    assert not (tmp_path / "out").exists()


def test_missing_text(model, tmp_path):
    missing = tmp_path / "no.txt"
    assert "no such text" in fails(
        "compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", missing
    )


def test_targets_that_match_nothing(model, tmp_path):
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--targets", "qq_proj")
    assert "qq_proj" in line
    assert "q_proj" in line
    assert "match" in fails("plan", model, "--keep", 0.8, "--ignore", "nothing")


def test_weight_with_nan(model, text, tmp_path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", text, *SMALL)
    assert name in line
    assert not (tmp_path / "out").exists()


def test_corrupt_shard(model, text, tmp_path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", text, *SMALL)
    assert str(model) in line


def test_missing_weights(model, text, tmp_path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", text, *SMALL)
    assert "lacks" in line


@pytest.mark.parametrize("kind", ["file", "folder", "full folder"])
def test_out_exists(model, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "mine").write_text("mine")
    assert "exists already" in fails("compress", model, out, "--keep", 0.8)
    assert out.exists()


def test_out_that_cannot_be_written(model, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    assert "cannot write" in fails("compress", model, blocker / "out", "--keep", 0.8)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_out_without_permission(model, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot write" in fails("compress", model, locked / "out", "--keep", 0.8)


def test_full_disk(model, text, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    before = left_in(tmp_path)
    line = fails("compress", model, tmp_path / "out", "--keep", 0.8, "--calibration", text, *SMALL)
    assert "No space left" in line
    assert left_in(tmp_path) == before | {".out.unfinished"}


def test_compressed_already(model, text, tmp_path):
    done = ["compress", model, tmp_path / "one", "--keep", 0.8, "--calibration", text, *SMALL]
    assert runner.invoke(app, [str(a) for a in done]).exit_code == 0
    line = fails("compress", tmp_path / "one", tmp_path / "two", "--keep", 0.5)
    assert "compressed already" in line
    assert "compressed already" in fails("plan", tmp_path / "one", "--keep", 0.5)


def test_inspect_of_a_dense_folder(model):
    assert "not compressed" in fails("inspect", model)


def test_inspect_of_a_damaged_folder(model, text, tmp_path):
    out = tmp_path / "out"
    done = ["compress", model, out, "--keep", 0.8, "--calibration", text, *SMALL]
    assert runner.invoke(app, [str(a) for a in done]).exit_code == 0
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "damaged" in fails("inspect", out)


def test_loss_that_is_not_finite(model, text):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    line = fails("evaluate", model, "--text", text, "--sequence-length", 32)
    assert "loss of window 0" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_in_the_middle(model, text, tmp_path, number):
    """A run that is stopped while it writes keeps its blocks, nothing else, and says so."""
    script = (
        "import signal, sys, time, transformers\n"
        # A job in the background is started with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "save = transformers.PreTrainedModel.save_pretrained\n"
        "def slow(self, folder, **kwargs):\n"
        "    save(self, folder, **kwargs)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "transformers.PreTrainedModel.save_pretrained = slow\n"
        "from slimrank.cli import main\n"
        "main()\n"
    )
    before = left_in(tmp_path)
    arguments = ["compress", model, tmp_path / "out", "--keep", "0.8", "--calibration", text]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments), *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert left_in(tmp_path) != before
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert stderr.splitlines()[-1] == (
        f"{word}: finished blocks are kept; go on: slimrank compress … --resume"
    )
    assert "Traceback" not in stderr
    assert left_in(tmp_path) == before | {".out.unfinished"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--order", "both"], "recipe: order: "),
        (["--anchor", 0.5], "an anchor is given, but kfac-svd has none"),
        (["--method", "aa-svd", "--anchor", 1.5], "recipe: anchor: "),
        (["--ridge", 2], "recipe: ridge: "),
        (["--ridge=-1"], "recipe: ridge: "),
        (["--refine", "slow"], "recipe: refine.preset: "),
        (["--within-block", "swift"], "recipe: within_block: "),
        (["--order", "one-shot", "--refine", "fast"], "refinement takes the blocks one after"),
        (["--order", "one-shot", "--within-block", "greedy"], "--within-block greedy takes"),
        (["--method", "svd", "--resume"], "keeps nothing to go on with; leave --resume out"),
    ],
)
def test_settings_of_a_sequential_run(model, tmp_path, flags, said):
    before = left_in(tmp_path)
    assert said in fails("compress", model, tmp_path / "out", "--keep", 0.8, *flags)
    assert left_in(tmp_path) == before


def test_a_run_that_was_cut_off(model, text, tmp_path, monkeypatch):
    """It is neither written over nor gone on with by another recipe, and told by one line."""
    out = tmp_path / "out"
    run = ["compress", model, out, "--calibration", text, *SMALL, "--method", "aa-svd"]

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert "No space left" in fails(*run, "--keep", 0.8)
    assert left_in(tmp_path) == {"model", "text.txt", ".out.unfinished"}
    assert "go on with --resume, or delete it" in fails(*run, "--keep", 0.8)
    line = fails(*run, "--keep", 0.7, "--resume")
    assert "begun with another recipe; give what it was begun with, or delete it" in line
    assert runner.invoke(app, [str(a) for a in [*run, "--keep", 0.8, "--resume"]]).exit_code == 0
    assert left_in(tmp_path) == {"model", "text.txt", "out"}


def test_usage_errors_exit_with_2(model):
    assert runner.invoke(app, ["compress", str(model), "o", "--memory", "-1"]).exit_code == 2
    assert runner.invoke(app, ["compress", str(model)]).exit_code == 2
    assert runner.invoke(app, ["plan", str(model), "--kep", "0.8"]).exit_code == 2


def test_interrupting_a_run_says_how_to_go_on(model, text, tmp_path, monkeypatch):
    out, real = tmp_path / "out", RunState.save
    command = ["compress", model, out, "--keep", 0.8, *SMALL, "--calibration", text]
    command += ["--order", "sequential", "--json"]

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", stop)
        result = runner.invoke(app, [str(a) for a in command])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == (
        "interrupted: finished blocks are kept; go on: slimrank compress … --resume"
    )
    assert left_in(tmp_path) == {"model", "text.txt", ".out.unfinished"}
    result = runner.invoke(app, [str(a) for a in [*command, "--resume"]])
    assert json.loads(result.stdout)["linears"]
    assert "note: " not in result.stderr
    assert left_in(tmp_path) == {"model", "text.txt", "out"}


def test_a_demo_that_is_cut_off_goes_on(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("slimrank.demo.fetch_model", lambda: dense_folder)
    monkeypatch.setattr("slimrank.demo.LENGTH", 64)
    command = ["demo", "--out", tmp_path / "out", "--num-sequences", 4, "--num-windows", 1]
    real = RunState.save

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", stop)
        result = runner.invoke(app, [str(a) for a in command])
    assert result.stderr.splitlines()[-1] == (
        "interrupted: finished blocks are kept; the same command goes on"
    )
    result = runner.invoke(app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    assert left_in(tmp_path) == {"out"}


def test_a_run_that_may_be_resumed_says_that_it_begins(model, text, tmp_path):
    command = ["compress", model, tmp_path / "out", "--keep", 0.8, *SMALL, "--calibration", text]
    result = runner.invoke(app, [str(a) for a in [*command, "--resume"]])
    assert result.exit_code == 0
    note = "note: nothing is kept of an earlier run; this one begins at the start"
    assert result.stderr.splitlines().count(note) == 1


@pytest.mark.parametrize("command", ["inspect", "plan", "evaluate", "quantize", "heal", "report"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_ends_cleanly(command, number, monkeypatch, tmp_path):
    """The signal comes once the command is at work; a second SIGTERM in the clean-up too."""
    cleaned = []

    def work(*_args, **_kwargs):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(1)

    at_work = {
        "inspect": "slimrank.cli.inspect.read_folder",
        "plan": "slimrank.cli.plan.plan",
        "evaluate": "slimrank.cli.evaluate.parse_source",
        "quantize": "slimrank.cli.quantize.quantize",
        "heal": "slimrank.cli.heal.heal",
        "report": "slimrank.cli.report.read_shown",
    }
    monkeypatch.setattr(at_work[command], work)
    text = tmp_path / "t.txt"
    text.write_text("the cat sat")
    more = {"plan": ["--keep", 0.8], "evaluate": ["--text", text], "quantize": [tmp_path / "q"]}
    more["heal"] = [tmp_path / "h", "--text", text]
    more["report"] = ["--out", tmp_path / "r.html"]
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    arguments = [command, tmp_path / "model", *more.get(command, [])]
    result = runner.invoke(app, [str(a) for a in arguments])
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert result.stderr.splitlines() == [f"{word}: nothing was kept"]
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert cleaned == [1]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(monkeypatch, model):
    def work(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        raise slimrank.errors.ModelError("went on")

    monkeypatch.setattr("slimrank.cli.plan.plan", work)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert "went on" in fails("plan", model, "--keep", 0.8)
    finally:
        signal.signal(signal.SIGINT, before)
