"""A line for each text, a dot on the epoch that was kept, and a sentence of what it brought."""

from xml.etree.ElementTree import fromstring

import pytest

from slimrank.pages.tuning import chart_of_tuning, fact_of_tuning


def labels(chart):
    return [entry.label for entry in chart.legend]


def titles(chart):
    return [x.text for x in fromstring(chart.svg).iter("title")][1:]


def dots(chart):
    """Places of the dots that mark a kept epoch."""
    marks = [x for x in fromstring(chart.svg).iter("circle") if "kept" in x.get("class").split()]
    return [(float(mark.get("cx")), float(mark.get("cy"))) for mark in marks]


def places(chart, style):
    """Where the line of a style goes through."""
    (line,) = (x for x in fromstring(chart.svg).iter("path") if x.get("class") == style)
    return [tuple(map(float, part.split())) for part in line.get("d")[1:].split(" L")]


@pytest.mark.parametrize("kept", [0, 1])
def test_both_texts_and_the_epoch_that_was_kept(kept, make_tuning):
    chart = chart_of_tuning(make_tuning(kept))
    assert labels(chart) == ["held-out sequences", "calibration sequences", "kept"]
    assert {
        "epoch 0, calibration sequences: 0.100",
        "epoch 3, calibration sequences: 0.0300",
        "epoch 0, held-out sequences: 0.123",
        "epoch 3, held-out sequences: 0.0700",
    } <= set(titles(chart))
    held_out = places(chart, "line k0")
    assert len(held_out) == len(places(chart, "line dotted k1")) == 4
    assert dots(chart) == [pytest.approx(held_out[kept], abs=0.1)]
    assert f"epoch {kept} kept: {('0.123', '0.0450')[kept]}" in titles(chart)


def test_without_held_out_text(make_tuning):
    found = make_tuning(3, None)
    chart = chart_of_tuning(found)
    assert labels(chart) == ["calibration sequences", "kept"]
    assert dots(chart) == [pytest.approx(places(chart, "line dotted k1")[3], abs=0.1)]
    assert "epoch 3 kept: 0.0300" in titles(chart)
    assert "0.100 → 0.0300 nats a token on calibration text" in fact_of_tuning(found).note


def test_the_fact_says_from_where_to_where(make_tuning):
    fact = fact_of_tuning(make_tuning(1))
    assert fact.value == "0.0450"
    assert fact.note == (
        "all blocks trained together: 0.123 → 0.0450 nats a token on held-out text, "
        "epoch 1 of 3 kept"
    )


def test_the_fact_of_a_training_that_brought_nothing(make_tuning):
    fact = fact_of_tuning(make_tuning(0))
    assert fact.value == "0.123"
    assert "0.123 → 0.123 nats a token" in fact.note
    assert fact.note.endswith("the start kept, for no epoch was better")
