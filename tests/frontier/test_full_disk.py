"""A benchmark on a disk that is full from some moment on."""

import pytest

from slimrank.errors import CheckpointError
from slimrank.frontier import measure_frontier
from tiny.faults import full_disk


def figures(report):
    return [
        (run.name, run.bytes, {k: x.value for k, x in run.perplexity.items()}) for run in report
    ]


def test_the_same_command_goes_on(make_bench, tmp_path):
    """One line, or rows that say it; and then the figures of a benchmark that was not cut off."""
    bench, out = make_bench(keep=[0.7]), tmp_path / "out"
    with full_disk(tmp_path / "whole", None) as done:
        whole = measure_frontier(bench, tmp_path / "whole")
    for moment in (1, len(done) // 3, 2 * len(done) // 3, len(done) - 5):
        with (
            full_disk(out, moment),
            pytest.raises(CheckpointError, match=r"cannot (write|lock) .*No space left") as caught,
        ):
            measure_frontier(bench, out)
        assert "\n" not in str(caught.value)
        assert not [path for path in out.rglob("*.partial*")]
        again = measure_frontier(bench, out)
        assert [run.error for run in again.runs] == [None, None]
        assert figures(again.runs) == figures(whole.runs)
        assert not list((out / "profiles").glob(".*"))
        (out / "frontier.json").unlink()
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
