"""Runs that are cut off, and what they leave: for the tests of resuming."""

import json

import pytest

from slimrank.checkpoint import state_folder

TIMES = ("seconds", "peak_bytes")


class CutOff(Exception):
    pass


def stopping(after, phases=("compressing", "building"), turn=1):
    """Give a `track` that cuts a run off in front of block `after`; never if that is None.

    Only the `turn`-th walk over the blocks that is called one of the phases counts.
    """
    walks = []

    def track(steps, what):
        walks.append(what)
        counts = what in phases and sum(walk in phases for walk in walks) == turn
        for step in steps:
            if counts and step == after:
                raise CutOff
            yield step

    return track


def cut_off(start, after, **others):
    with pytest.raises(CutOff):
        start(stop=after, **others)


def timeless(values):
    """A report without what time and memory it took."""
    if isinstance(values, dict):
        return {key: timeless(x) for key, x in values.items() if key not in TIMES}
    return [timeless(x) for x in values] if isinstance(values, list) else values


def assert_same_folder(out, expected):
    files = {path.name for path in expected.iterdir()}
    assert {path.name for path in out.iterdir()} == files
    assert "model.safetensors" in files
    for name in files - {"report.json"}:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (out, expected))
    assert timeless(one) == timeless(other)


def blocks_kept(out):
    return len(list(state_folder(out).glob("block-*.json")))
