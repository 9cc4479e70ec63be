"""What README and docs show runs: every python and console block, and the examples."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimrank.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = ["--num-sequences", "4", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def made(dense_folder, tmp_path_factory):
    """What the docs speak of: model/, model-slim/ and text files; not to be changed."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model").symlink_to(dense_folder)
    for name, times in (("text.txt", 120), ("test.txt", 24)):
        (folder / name).write_text("the cat sat on the mat and ran to the tree . " * times)
    paths = [str(folder / name) for name in ("model", "model-slim", "text.txt")]
    arguments = ["compress", *paths[:2], "--keep", "0.6", "--calibration", paths[2]]
    assert CliRunner().invoke(app, [*arguments, *SMALL]).exit_code == 0
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_blocks_of_a_page_run(page, place):
    for number, (language, code) in enumerate(blocks(page)):
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", code.replace("OUT", f"out{number}")],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (code, done.stderr)
            continue
        for line in code.splitlines():
            command = line.removeprefix("$ ")
            if not line.startswith("$ slimrank ") or " demo" in command:
                continue
            arguments = shlex.split(command.replace("OUT", f"out{number}"), comments=True)[1:]
            if arguments[0] == "evaluate":
                arguments += ["--sequence-length", "32"]
            if "--calibration" in arguments:
                arguments += SMALL
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan_sizes.py", "model"],
        ["compress_in_memory.py", "model", "text.txt", "out"],
        ["load_and_generate.py", "model-slim", "the cat"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_examples_run(arguments, place):
    script = ROOT / "examples" / arguments[0]
    assert len(script.read_text().splitlines()) <= 30
    done = subprocess.run(
        [sys.executable, str(script), *arguments[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
