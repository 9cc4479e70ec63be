"""`slimrank plan` by the command line: the same options as `compress`, the same refusals."""

import inspect
import json

import pytest
from typer.testing import CliRunner

from slimrank.cli import app
from slimrank.cli.compress import compress_command
from slimrank.cli.plan import plan_command

BESIDES = {
    "out",
    "profile",
    "calibration",
    "seed",
    "resume",
    "remote_code",
}  # change nothing that a plan tells
SETTLED = {"importance_weight", "retained_share", "importance_after_norm", "anchor", "ridge"}


def run(*arguments):
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_options_are_those_of_compress():
    ours, theirs = (inspect.signature(c).parameters for c in (plan_command, compress_command))
    assert theirs.keys() - ours.keys() == BESIDES | SETTLED
    assert ours.keys() <= theirs.keys()
    assert all(ours[name].annotation == theirs[name].annotation for name in ours)


def test_memory_disk_and_passes_are_told(dense_folder):
    arguments = [dense_folder, "--keep", 0.6, "--stream", "--memory", 0.001]
    needs = json.loads(run(*arguments, "--json"))["needs"]
    printed = run(*arguments)
    largest = max(needs["phases"], key=lambda phase: sum(phase["memory"].values()))
    said = f"peak of memory {needs['memory_bytes'] / 1e9:.2f} GB, in {largest['name']}"
    assert said in printed
    assert "what compress would hold, estimated, GB" in printed
    assert all(f"\n{phase['name']} " in printed for phase in needs["phases"])
    assert f"disk {needs['disk_bytes'] / 1e9:.2f} GB meanwhile (" in printed
    assert "spilled" in printed
    assert "passes: calibration text 3.01 times forwards and 1 backwards\n" in printed
    assert needs["device_bytes"] == 0
    assert "accelerator" not in printed


def test_an_accelerator_has_a_column(dense_folder):
    printed = run(dense_folder, "--keep", 0.6, "--device", "cuda")
    assert "memory  device" in " ".join(printed.split()).replace("memory device", "memory  device")
    assert "peak of the accelerator's memory" in printed


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--effort", "fast"], "calibration"),
        (["--allocation", "threshold"], "gradients, backwards"),
        (["--method", "aa-svd", "--refine", "fast"], "refine"),
        (["--order", "sequential", "--method", "swift-svd"], "outputs"),
        (["--passes", "2"], "second look, calibration"),
        (["--generate", "4"], "generate"),
        (["--tune", "1"], "tune"),
    ],
)
def test_phases_are_those_of_the_recipe(flags, name, dense_folder):
    phases = json.loads(run(dense_folder, "--keep", 0.6, *flags, "--json"))["needs"]["phases"]
    assert name in [phase["name"] for phase in phases]


def test_what_compress_refuses_is_refused(dense_folder):
    done = CliRunner().invoke(
        app, ["plan", str(dense_folder), "--keep", "0.6", "--tune", "1", "--stream"]
    )
    assert done.exit_code == 1
    assert "leave out --tune" in done.stderr
