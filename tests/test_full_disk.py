"""The disk is full from any moment on: one clear line, nothing half-written, and it goes on."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimrank.cli import app
from tiny.faults import full_disk

SMALL = ["--num-sequences", "4", "--sequence-length", "32", "--held-out-sequences", "2"]
COMMANDS = {
    "profile": ["profile"],
    "one-shot": ["compress", "--keep", "0.7"],
    "sequential": ["compress", "--keep", "0.7", "--method", "aa-svd"],
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:uniform ranks do better:slimrank.errors.NumericalWarning"
)


def invoke(command, *more):
    return CliRunner().invoke(app, [str(x) for x in (*command, *more)])


def tensors(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def moments(steps):
    """At the first steps, somewhere in between, and at the last."""
    last = steps - 2  # the one after it syncs the name of what stands: no failure if it fails
    return sorted({1, steps // 3, 2 * steps // 3, last})


def left(folder):
    return {path.name for path in folder.iterdir()}


def check_one_line(result):
    assert result.exit_code == 1, (result.output, result.exception)
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert "No space left" in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_once_there_is_room(name, dense_folder, text_file, tmp_path):
    first, *flags = COMMANDS[name]
    whole, out = tmp_path / "whole", tmp_path / "here" / "out"
    out.parent.mkdir()
    flags = [*flags, *SMALL, "--calibration", text_file]
    with full_disk(tmp_path, None) as done:
        assert invoke([first, dense_folder, whole], *flags).exit_code == 0
    assert {"tensors", "io.open", "os.fsync"} <= set(done)
    resumed = set()
    for moment in moments(len(done)):
        with full_disk(tmp_path, moment):
            check_one_line(invoke([first, dense_folder, out], *flags))
        assert left(out.parent) <= {".out.unfinished"}
        resumed |= left(out.parent)
        result = invoke([first, dense_folder, out], *flags, "--resume")
        assert result.exit_code == 0, (moment, result.output)
        assert left(out.parent) == {"out"}
        assert tensors(out) == tensors(whole), moment
        remove(out)
    assert resumed  # some of them were gone on with


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_rounding_leaves_nothing(compressed_folder, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "here" / "out"
    out.parent.mkdir()
    with full_disk(tmp_path, None) as done:
        assert invoke(["quantize", compressed_folder, whole]).exit_code == 0
    for moment in moments(len(done)):
        with full_disk(tmp_path, moment):
            check_one_line(invoke(["quantize", compressed_folder, out]))
        assert not left(out.parent)
    assert invoke(["quantize", compressed_folder, out]).exit_code == 0
    assert tensors(out) == tensors(whole)
