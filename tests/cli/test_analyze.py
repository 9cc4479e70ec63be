"""`slimrank analyze` writes what it prints, and writes nothing where it fails."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimrank.analysis import AnalysisReport, analyze
from slimrank.checkpoint import read_profile
from slimrank.cli import app
from tiny import profiles

FILES = {
    "analysis.json",
    "linears.csv",
    "heat_map.png",
    "spectra.png",
    "energy_rank.png",
    "importance.png",
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    spectra = {f"{i}.attn.q": profiles.flat(count) for i, count in enumerate((1, 2, 3, 4, 3, 1))}
    content = profiles.build(spectra, [0.9, 0.7, 0.5, 0.3, 0.5, 0.8], 0.1)
    return profiles.write(content, tmp_path / "profile")


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def fails(*arguments: object) -> str:
    """Run, expect exit code 1, and give the one line on stderr."""
    printed, said = run(*arguments, code=1)
    assert printed == ""
    (line,) = said.splitlines()
    return line


def test_files_and_table(profile, tmp_path):
    out = tmp_path / "deep" / "out"
    printed, said = run(profile, "--out", out)
    assert said == ""
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    report = AnalysisReport.model_validate_json((out / "analysis.json").read_text())
    assert report == analyze(read_profile(profile))
    assert (out / "linears.csv").read_text() == report.csv()
    found = report.kinds[0].correlations.all_blocks.pearson
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("attn.q")]
    assert row == ["attn.q", "6", "2.3", "0.583", "2.3", f"{found.value:+.2f}", "negative",
                   f"{found.p_value:.2g}"]  # fmt: skip
    assert "all, the last after the final norm" in printed
    assert "without the first two and the last" in printed


def test_json_is_all_that_stdout_holds(profile, tmp_path):
    printed, _ = run(profile, "--out", tmp_path / "out", "--json")
    assert json.loads(printed) == json.loads((tmp_path / "out" / "analysis.json").read_text())


def test_one_block_and_few_tokens(tmp_path):
    content = profiles.build({"0.q": profiles.flat(2)}, [0.5], tokens=3)
    profile = profiles.write(content, tmp_path / "profile")
    printed, said = run(profile, "--out", tmp_path / "out")
    assert "all blocks: no correlation (1 block, and 3 are needed)" in printed
    assert said.startswith("warning: 1 linears saw fewer tokens")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_constant_importance(tmp_path):
    spectra = {f"{i}.q": profiles.flat(i + 1) for i in range(4)}
    profile = profiles.write(profiles.build(spectra, [0.5] * 4), tmp_path / "profile")
    printed, _ = run(profile, "--out", tmp_path / "out")
    assert "all blocks: no correlation (the importance is the same in all blocks)" in printed


def test_no_such_profile(tmp_path):
    line = fails(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


def test_out_exists(profile, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in fails(profile, "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("module", ["scipy", "matplotlib.figure"])
def test_without_the_extra_nothing_is_written(module, profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = fails(profile, "--out", tmp_path / "out")
    assert line.endswith("pip install 'slimrank[analysis]'")
    assert {path.name for path in tmp_path.iterdir()} == {"profile"}
