"""A frontier is read as written, refused where it is none, and its front is the front."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrank.errors import CheckpointError
from slimrank.frontier import result
from slimrank.pages import FrontierReport, FrontierRun, front


def test_it_reads_back(make_frontier, make_run):
    report = make_frontier(make_run("a"), date="today")
    text = report.model_dump_json(by_alias=True)
    assert '"schema":1' in text
    assert FrontierReport.from_json(text, "f") == report


def test_what_a_benchmark_writes_is_read():
    """The writer's types are its own; every key of theirs has to be known here."""
    written = result.FrontierReport(
        model="by hand",
        environment={"torch": "2"},
        date="today",
        settings={"texts": {"wiki": {}}},
        runs=(
            result.FrontierRun(
                name="a",
                recipe={"order": "sequential"},
                keep=0.8,
                layout="auto",
                method="svd",
                allocation="global",
                refine="fast",
                int8_factors=True,
                perplexity={"wiki": result.TextFigure(value=20.5, tokens=9, in_domain=True)},
                accuracy={"piqa": result.TaskFigure(value=0.5, stderr=0.1, n=3)},
            ),
        ),
    ).to_json()
    again = FrontierReport.from_json(written, "written")
    assert json.loads(again.model_dump_json(by_alias=True)) == json.loads(written)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "frontier.json is no frontier: : Invalid JSON"),
        ('{"schema": 2, "model": "m", "runs": []}', "schema: Input should be 1"),
        ('{"schema": 1, "model": "m", "runs": [{}]}', "runs.0.name: Field required"),
    ],
)
def test_what_is_none_is_refused(text, what):
    with pytest.raises(CheckpointError) as caught:
        FrontierReport.from_json(text, "frontier.json")
    assert what in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_perplexity_is_above_zero(make_frontier, make_run, value):
    values = json.loads(make_frontier(make_run("a")).model_dump_json(by_alias=True))
    values["runs"][0]["perplexity"] = {"t": {"value": value}}
    with pytest.raises(CheckpointError, match="a perplexity is above 0"):
        FrontierReport.from_json(json.dumps(values), "f")


def test_keys_of_later_versions_are_passed_over(make_frontier, make_run):
    assert make_frontier(make_run("a", news=1), other=2).runs[1].name == "a"


def test_no_perplexity_is_not_a_number(make_frontier, make_run):
    runs = make_frontier(make_run("a", perplexity=None), make_run("b")).runs
    assert math.isnan(runs[1].on("wiki"))
    assert math.isnan(runs[2].on("elsewhere"))
    assert runs[2].on("wiki") == 40.0


def test_other_domains_come_first(make_frontier, make_run):
    texts = {"known": {"value": 1.0, "in_domain": True}, "new": {"value": 2.0}}
    report = make_frontier({**make_run("a"), "perplexity": texts})
    assert report.texts() == ["wiki", "new", "known"]
    assert [report.is_in_domain(text) for text in report.texts()] == [False, False, True]


def test_the_dense_model_is_the_largest_baseline(make_frontier, make_run):
    int8 = make_run("int8", 1_500_000, is_dense=True)
    large = make_run("not dense", 9_000_000)
    assert make_frontier(int8, large).dense().name == "dense"


sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=12)


@given(sizes)
def test_the_front_is_what_nothing_beats(pairs):
    runs = [
        FrontierRun(name=str(i), bytes=size, seconds=cost) for i, (size, cost) in enumerate(pairs)
    ]
    found = {(run.bytes, run.seconds) for run in front(runs, lambda run: run.seconds)}
    expected = {
        (a, b)
        for a, b in pairs
        if not any((c <= a and d < b) or (c < a and d <= b) for c, d in pairs)
    }
    assert found == expected


def test_runs_without_a_figure_are_not_on_it():
    runs = [FrontierRun(name="a", bytes=1, seconds=math.nan), FrontierRun(name="b", bytes=2)]
    assert [run.name for run in front(runs, lambda run: run.seconds)] == ["b"]
