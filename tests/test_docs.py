"""What README and docs show runs: every python and console block, and the examples."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from slimrank.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
JOBS = sorted((ROOT / "docs" / "jobs").iterdir())
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


def test_every_test_that_a_page_names_exists():
    named = [name for page in PAGES for name in TEST.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 20
    for path, name in named:
        tests = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), re.M)
        assert name in tests, f"{path}::{name}"


def test_every_link_to_a_file_leads_somewhere():
    for page in PAGES:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def commands_of(path: Path) -> list[list[str]]:
    """Arguments of every call of slimrank in a job, put together as a shell would."""
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8"))
    if path.suffix == ".yaml":
        (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
        text = " ".join(container["args"])
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = re.findall(r"(?:srun|exec)(?: --\S+)* slimrank ([^&;\n]*)", "\n".join(lines))
    return [shlex.split(call) for call in found]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_commands_of_a_job_parse(path):
    """One line begins the work and goes on with it."""
    (arguments,) = commands_of(path)
    command = typer.main.get_command(app).commands[arguments[0]]
    values = command.make_context(arguments[0], arguments[1:]).params
    assert values["resume"] is True
    assert values["keep"] == 0.8
    text = path.read_text(encoding="utf-8")
    assert "HF_HUB_OFFLINE" in text
    assert "HF_HOME" in text


def test_the_slurm_job():
    path = JOBS[1]
    assert subprocess.run(["bash", "-n", path], check=False, capture_output=True).stderr == b""
    options = re.findall(r"^#SBATCH --([\w-]+)", path.read_text(encoding="utf-8"), re.M)
    assert {"requeue", "signal", "open-mode", "time"} <= set(options)


def test_a_slurm_job_that_is_done_ends_at_once(tmp_path):
    """And one that is not runs the command; srun is only a name here."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "srun $*"\nexit 143\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment |= {"OUT": str(tmp_path / "out"), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "16"}

    def run():
        return subprocess.run(
            ["bash", JOBS[1]], env=environment, capture_output=True, text=True, check=False
        )

    begun = run()
    assert begun.stdout.startswith("srun --cpus-per-task=16 slimrank compress ")
    assert begun.returncode == 143
    (tmp_path / "out").mkdir()
    done = run()
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'} stands already\n")


def test_the_kubernetes_job():
    job = yaml.safe_load(JOBS[0].read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"]["name"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["backoffLimit"] > 0
    assert pod["restartPolicy"] == "Never"  # a policy for failures asks for it
    assert pod["terminationGracePeriodSeconds"] >= 30
    (container,) = pod["containers"]
    disrupted, failed = spec["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert failed["onExitCodes"]["values"] == [1, 2]  # and not 130, 137, 143
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (arguments,) = commands_of(JOBS[0])
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    used = {str(Path(x).parent) for x in arguments if x.startswith("/")}
    assert used <= paths
    assert f"test -d {arguments[2]} ||" in container["args"][0]


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
