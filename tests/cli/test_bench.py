"""`slimrank bench frontier`: a table or JSON on stdout, progress on stderr, and exit codes."""

import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from slimrank.calibration import packaged_text
from slimrank.cli import app
from slimrank.frontier import FrontierReport


@pytest.fixture
def values(dense_folder, text_file, tmp_path):
    (tmp_path / "eval.txt").write_text(packaged_text("evaluation")[:1200], encoding="utf-8")
    calibration = {"source": [str(text_file)], "num_sequences": 4, "sequence_length": 32}
    return {
        "model": str(dense_folder),
        "texts": {"wiki": {"path": str(tmp_path / "eval.txt"), "in_domain": True}},
        "windows": {"length": 64, "number": 3},
        "base": {"calibration": {**calibration, "held_out_sequences": 1}},
        "keep": [0.6],
    }


@pytest.fixture
def run(values, tmp_path):
    """`run(*flags, code=0, **changes)` gives stdout and stderr."""

    def run(*flags, code=0, **changes):
        recipe = tmp_path / "bench.yaml"
        recipe.write_text(yaml.safe_dump({**values, **changes}))
        arguments = ["bench", "frontier", "--recipe", recipe, "--out", tmp_path / "out", *flags]
        result = CliRunner().invoke(app, [str(x) for x in arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result.stdout, result.stderr

    return run


def test_a_table(run, tmp_path):
    printed, said = run()
    lines = printed.splitlines()
    assert lines[0] == "perplexity; * of the kind that was calibrated on"
    assert lines[1].split() == [*("run", "MB", "linears", "MB", "wiki", "*"), "seconds", "front"]
    assert [line.split()[0] for line in lines[2:4]] == ["dense", "base"]
    assert lines[-1].startswith(f"wrote {tmp_path / 'out' / 'frontier.json'}")
    assert "base @ 0.6 (2 of 2)" in said
    assert (tmp_path / "out" / "frontier.svg").read_bytes().startswith(b"<?xml")


def test_json_is_all_that_stdout_holds_and_is_the_file(run, tmp_path):
    printed, _ = run("--json")
    written = (tmp_path / "out" / "frontier.json").read_text()
    assert json.loads(printed) == json.loads(written)
    assert FrontierReport.model_validate_json(printed).texts == ["wiki"]


def test_exit_codes(run):
    some = {"keep": [0.6, 0.001], "dense": False}
    printed, said = run(**some)
    assert "base @ 0.001: " in printed
    assert "base @ 0.001: failed: " in said
    run("--strict", code=1, **some)
    run(code=1, keep=[0.001], dense=False)
    run("--strict")


def test_an_error_is_one_line(run, tmp_path):
    printed, said = run(code=1, metod="svd")
    assert printed == ""
    (line,) = said.splitlines()
    assert line.startswith(f"error: {tmp_path / 'bench.yaml'}: metod: unknown key; there are model")


def test_without_matplotlib_there_is_no_picture(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, said = run()
    assert "warning: plots need matplotlib" in said
    assert not (tmp_path / "out" / "frontier.svg").exists()


def test_interrupted(run, monkeypatch):
    def cut_off(*_arguments, **_named):
        raise KeyboardInterrupt

    monkeypatch.setattr("slimrank.cli.bench.measure_frontier", cut_off)
    _, said = run(code=130)
    assert said.splitlines() == ["interrupted: finished rows are kept; the same command goes on"]
