"""A mark a run, names beside baselines, and no figure that pushes the others together."""

import math
from xml.etree.ElementTree import fromstring

from slimrank.pages.scatter import SPREAD, chart_of_runs


def titles(chart):
    return [title.text for title in fromstring(chart.svg).iter("title")][1:]


def names(chart):
    texts = fromstring(chart.svg).iter("text")
    return [text.text for text in texts if text.get("class") == "label"]


def test_a_mark_a_run(make_frontier, make_run):
    report = make_frontier(
        make_run("one", perplexity=30.0),
        make_run("two", 1_100_000, 25.0, method="aa-svd"),
        make_run("unknown", perplexity=None),
        make_run("failed", error="no"),
    )
    chart = chart_of_runs(report, "wiki", is_wide=True)
    assert [title.splitlines()[0] for title in titles(chart)] == ["dense", "one", "two"]
    assert [entry.label for entry in chart.legend] == ["swift-svd", "aa-svd", "dense baseline"]
    assert names(chart) == ["dense", "two"]
    assert names(chart_of_runs(report, "wiki", is_wide=False)) == ["dense"]


def test_models_with_int8_factors_are_hollow(make_frontier, make_run):
    run = make_run("one, int8", 600_000, 31.0, int8_factors=True)
    chart = chart_of_runs(make_frontier(make_run("one", perplexity=30.0), run), "wiki", True)
    marks = [mark.get("class") for mark in fromstring(chart.svg).iter("circle")]
    assert marks == ["mark k0", "mark hollow k0"]
    assert "keep 0.8 in int8" in titles(chart)[2]
    assert [entry.label for entry in chart.legend][1:] == ["hollow: int8 factors", "dense baseline"]
    assert names(chart) == ["dense", "one, int8", "one"]


def test_what_is_far_above_stays_at_the_edge(make_frontier, make_run):
    runs = [make_run("one", perplexity=30.0), make_run("two", perplexity=1e8)]
    chart = chart_of_runs(make_frontier(*runs, make_run("no", perplexity=math.inf)), "wiki", True)
    assert f"2 at the upper edge are worse than {SPREAD * 20:,.0f}" in chart.note
    svg = fromstring(chart.svg)
    heights = [float(x.get("cy")) for x in svg.iter("circle") if x[0].tag == "title"]
    assert len(heights) == 3
    assert min(heights) == heights[1] == heights[2] > 0
    assert any("perplexity 1e+08" in title for title in titles(chart))


def test_names_do_not_cover_each_other(make_frontier, make_run):
    crowd = [make_run(f"number {i}", 2_000_000, 20.0, is_dense=True) for i in range(20)]
    assert len(names(chart_of_runs(make_frontier(*crowd), "wiki", is_wide=True))) == 3
