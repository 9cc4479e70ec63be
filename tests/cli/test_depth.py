"""`slimrank depth` prints the errors of each report, and writes nothing where it fails."""

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from slimrank.cli.depth import depth_command
from slimrank.depth_plot import DepthReport, read_depths
from tiny import depths

app = typer.Typer()
app.command()(depth_command)


@pytest.fixture
def refined(tmp_path):
    report = depths.build([0.1, 0.2, 0.3], [0.4, 0.5, 0.00000612], [0.9] * 3, method="aa-svd")
    return depths.write(report, tmp_path / "refined")


@pytest.fixture
def plain(tmp_path):
    return depths.write(depths.build([0.6, 0.7]), tmp_path / "plain")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def fails(*arguments):
    """Run, expect exit code 1, and give the one line on stderr."""
    printed, said = run(*arguments, code=1)
    assert printed == ""
    (line,) = said.splitlines()
    return line


def table(printed):
    """Cells of the rows that begin with a block."""
    rows = [line.split() for line in printed.splitlines()]
    return [row for row in rows if row and row[0].isdigit()]


def test_one_row_a_block_and_the_text_in_the_title(refined, plain):
    printed, said = run(refined, plain)
    assert said == ""
    first, one, two, head, *_ = printed.splitlines()
    assert first == "relative error and cosine distance of the blocks' outputs"
    assert one == "  1: aa-svd, keep 0.8, refined, on held-out text"
    assert two == "  2: svd-llm, keep 0.8, on calibration text, as none was held out"
    assert head.split() == ["block", "error", "1", "cosine", "1", "error", "2", "cosine", "2"]
    assert table(printed) == [
        ["0", "0.4", "0.1", "0.6", "0.15"],
        ["1", "0.5", "0.125", "0.7", "0.175"],
        ["2", "6.12e-06", "1.53e-06", "-", "-"],
    ]


def test_many_runs_go_into_several_tables(tmp_path):
    folders = [depths.write(depths.build([i / 10]), tmp_path / f"f{i}") for i in range(1, 8)]
    printed, _ = run(*folders)
    assert table(printed) == [
        ["0", "0.1", "0.025", "0.2", "0.05", "0.3", "0.075", "0.4", "0.1", "0.5", "0.125"],
        ["0", "0.6", "0.15", "0.7", "0.175"],
    ]
    assert "  5: svd-llm, keep 0.8 (f5), on calibration" in printed
    heads = [line.split()[1:3] for line in printed.splitlines() if line.startswith("block")]
    assert heads == [["error", "1"], ["error", "6"]]


def test_json_is_all_that_stdout_holds(refined, plain):
    printed, _ = run(plain, refined, "--json")
    assert DepthReport.model_validate_json(printed) == read_depths([plain, refined])
    one, two = json.loads(printed)["runs"]
    assert (one["label"], one["refined"], two["refined"]) == ("svd-llm, keep 0.8", False, True)
    assert one["blocks"][0]["held_out"] is None
    assert two["blocks"][1]["unrefined_held_out"]["relative_error"] == 1.8


def test_out_is_written_and_named(refined, tmp_path):
    out = tmp_path / "new" / "depth.png"
    printed, _ = run(refined, "--out", out)
    assert printed.splitlines()[-1] == f"wrote {out}"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(table(printed)) == 3
    again = tmp_path / "again.png"
    assert json.loads(run(refined, "--out", again, "--json")[0])
    assert again.is_file()


def test_runs_that_differ_in_more_than_the_method_are_said_to(plain, tmp_path):
    other = depths.build([0.1], keep=0.9, model="another", calibration_fingerprint="2" * 64)
    printed, _ = run(plain, depths.write(other, tmp_path / "other"))
    assert printed.splitlines()[-2:] == [
        "the runs are of different models: by hand, another",
        "the runs were calibrated on different text",
    ]
    assert "different" not in run(plain, plain)[0]


def test_a_one_shot_run(plain, tmp_path):
    folder = depths.write(depths.build([]), tmp_path / "once")
    assert fails(plain, folder, "--out", tmp_path / "depth.png") == (
        f"error: {folder} was made in one-shot order and holds no errors by depth; "
        "compress with --order sequential"
    )
    assert not (tmp_path / "depth.png").exists()


def test_no_such_folder(tmp_path):
    assert "holds no report.json" in fails(tmp_path / "nowhere")


def test_out_exists(refined, tmp_path):
    out = tmp_path / "depth.png"
    out.write_text("mine")
    assert fails(refined, "--out", out) == (
        f"error: {out} exists already; name a file that does not"
    )
    assert out.read_text() == "mine"


def test_the_picture_alone_needs_the_extra(refined, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = fails(refined, "--out", tmp_path / "depth.png")
    assert line.endswith("pip install 'slimrank[analysis]'")
    assert {path.name for path in tmp_path.iterdir()} == {"refined"}
    assert len(table(run(refined)[0])) == 3


def test_a_folder_has_to_be_named():
    assert "FOLDER" in run(code=2)[1]
