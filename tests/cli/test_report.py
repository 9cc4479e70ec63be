"""`slimrank report` writes one page, never over another, and says what is wrong in one line."""

import json

import pytest
import typer
from typer.testing import CliRunner

from slimrank.cli.report import report_command
from slimrank.report import CompressionReport
from tiny import depths

app = typer.Typer()
app.command()(report_command)


@pytest.fixture
def folder(tmp_path):
    return depths.write(depths.build([0.1, 0.2], [0.3, 0.4]), tmp_path / "slim")


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


def test_the_page_is_in_the_folder_unless_named(folder, tmp_path):
    page = folder / "report.html"
    assert run(folder) == (f"wrote {page}\n", "")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    out = tmp_path / "new" / "page.html"
    assert run(folder, "--out", out)[0] == f"wrote {out}\n"
    assert out.read_bytes() == page.read_bytes()


def test_a_page_is_replaced_by_force_only(folder):
    page = folder / "report.html"
    page.write_text("mine")
    assert fails(folder) == f"error: {page} exists already; name another file, or say --force"
    assert page.read_text() == "mine"
    run(folder, "--force")
    assert "Compression report" in page.read_text(encoding="utf-8")


def test_json_is_what_the_page_shows(folder):
    printed, _ = run(folder, "--json")
    written = (folder / "report.json").read_text()
    assert CompressionReport.from_json(printed, "printed") == CompressionReport.from_json(
        written, "written"
    )
    assert (folder / "report.html").is_file()


def test_a_frontier(tmp_path):
    run_of_it = {"name": "a", "keep": 0.8, "bytes": 5, "perplexity": {"wiki": {"value": 20.5}}}
    frontier = {"schema": 1, "model": "by hand", "runs": [run_of_it]}
    (tmp_path / "frontier.json").write_text(json.dumps(frontier))
    printed = json.loads(run(tmp_path, "--json")[0])
    assert printed["schema"] == 1
    assert printed["runs"][0]["perplexity"]["wiki"]["value"] == 20.5
    assert "Frontier of sizes" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_bad_folders(tmp_path):
    assert "holds no report.json and no frontier.json" in fails(tmp_path / "nowhere")
    (tmp_path / "frontier.json").write_text('{"schema": 1}')
    assert "frontier.json is no frontier: model: Field required" in fails(tmp_path)
    assert not (tmp_path / "report.html").exists()
