"""Processes that are killed at random moments, and gone on with, to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimrank

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"
KILLS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script says of some kills in either order, in one process that forks them."""
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", str(KILLS), "--seed", "1", "--out", folder / "k.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(slimrank.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "k.json").read_text())["results"]


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_killed_runs_end_in_the_same_bytes(order, found):
    run = found[order]
    assert len(run["kills"]) == run["killed"] == KILLS
    assert sum(run["kills_survived"]) == KILLS
    assert run["runs_ended"] == len(run["sha256"]["ended"]) > 0
    assert set(run["sha256"]["ended"]) == {run["sha256"]["unbroken"]}
    assert run["nothing_else"]
