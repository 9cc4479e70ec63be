"""``slimrank heal`` prints the curve and what it came to, and errors in one line."""

import json
import signal

import pytest
from typer.testing import CliRunner

from slimrank.checkpoint import read_folder, state_folder
from slimrank.cli import app
from slimrank.healing import training

runner = CliRunner()
SHORT = ["--num-sequences", "8", "--sequence-length", "32", "--held-out-sequences", "4"]


@pytest.fixture
def healed(compressed_folder, text_file, tmp_path):
    """`healed(*flags)` runs the command."""

    def invoke(*flags, folder=compressed_folder, out=tmp_path / "out"):
        texts = ["--text", text_file, *SHORT]
        return runner.invoke(app, [str(x) for x in ("heal", folder, out, *texts, *flags)])

    return invoke


def test_it_prints_the_curve_and_is_read_by_the_others(healed, tmp_path):
    done = healed("--learning-rate", "1e-3", "--batch-sequences", "2", "--epochs", "2")
    assert done.exit_code == 0, done.output
    assert "nats a token" in done.stdout
    assert "million parameters trained for" in done.stdout
    assert f"written to {tmp_path / 'out'}" in done.stdout.replace("\n", "")
    assert "healing" in done.stderr
    inspected = runner.invoke(app, ["inspect", str(tmp_path / "out")])
    assert inspected.exit_code == 0, inspected.output
    assert "healed on held-out text" in inspected.stdout
    page = runner.invoke(app, ["report", str(tmp_path / "out")])
    assert page.exit_code == 0, page.output


def test_json_is_what_the_folder_holds(healed, tmp_path):
    done = healed("--json", "--seed", "3", "--patience", "2")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == read_folder(tmp_path / "out").healing.model_dump(mode="json")
    assert report["recipe"]["seed"] == 3
    assert report["recipe"]["learning_rate"] == 5e-5


def test_adapters(healed):
    done = healed("--json", "--lora", "2")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["recipe"]["lora_rank"] == 2
    assert report["recipe"]["learning_rate"] == 5e-4
    assert "peft" not in report["environment"]


def test_resume_begins_and_goes_on(healed, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SPACING", 0.0)
    real = training.Training._keep

    def interrupted(self, checks, best):
        real(self, checks, best)
        signal.raise_signal(signal.SIGINT)

    flags = ("--batch-sequences", "2", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_keep", interrupted)
        cut = healed(*flags)
    assert cut.exit_code == 130
    assert "nothing is kept of an earlier run; this one begins at the start" in cut.stderr
    assert cut.stderr.splitlines()[-1] == (
        "interrupted: what was trained is kept; go on: slimrank heal … --resume"
    )
    assert state_folder(tmp_path / "out").is_dir()
    refused = healed("--batch-sequences", "2")
    assert refused.exit_code == 1
    assert "go on with --resume" in refused.stderr
    done = healed(*flags)
    assert done.exit_code == 0, done.output
    assert "begins at the start" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "source", "message"),
    [
        ([], "dense_folder", "not compressed by slimrank"),
        (["--teacher", "./gone"], "compressed_folder", "no such model folder: ./gone"),
        (["--epochs", "0"], "compressed_folder", "heal: epochs: "),
        (["--learning-rate=-1"], "compressed_folder", "heal: learning_rate: "),
        (["--lora", "0"], "compressed_folder", "heal: lora_rank: "),
        (["--text", "./gone.txt"], "compressed_folder", "no such text file: ./gone.txt"),
        (["--sequence-length", "9000"], "compressed_folder", "fewer than one sequence of 9000"),
        (["--device", "cuda:99"], "compressed_folder", "cannot use device cuda:99"),
    ],
)
def test_errors_are_one_line(flags, source, message, healed, request, tmp_path):
    done = healed(*flags, folder=request.getfixturevalue(source))
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_text_is_needed(compressed_folder, tmp_path):
    done = runner.invoke(app, ["heal", str(compressed_folder), str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no text to heal on: give --text FILE" in done.stderr
