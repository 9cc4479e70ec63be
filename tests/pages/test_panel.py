"""Values have their places, ticks are round and within, and what has no place leaves a gap."""

import math
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrank.pages.panel import Axis, Panel, Scale
from slimrank.pages.svg import markup

finite = st.floats(1e-12, 1e12)


def test_ends_and_middle_of_a_scale():
    scale = Scale(10.0, 30.0, 100.0, 0.0)
    assert [scale.place(value) for value in (10.0, 20.0, 30.0)] == [100.0, 50.0, 0.0]
    scale = Scale(1.0, 100.0, 0.0, 10.0, is_log=True)
    assert scale.place(10.0) == pytest.approx(5.0)


@given(values=st.lists(finite, min_size=1), is_log=st.booleans(), is_whole=st.booleans())
def test_every_value_is_within_and_ticks_too(values, is_log, is_whole):
    scale = Scale.of(Axis("x", values, is_log, is_whole), 0.0, 1.0)
    assert all(0 <= scale.place(value) <= 1 for value in values)
    ticks = scale.ticks()
    assert len(ticks) <= 12
    assert all(-1e-6 <= scale.place(tick) <= 1 + 1e-6 for tick in ticks)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ((0.0, 29.0), False, [0, 5, 10, 15, 20, 25, 30]),
        ((24.0, 160.0), True, [50, 100]),
        ((1.0, 1e12), True, [1, 100, 1e4, 1e6, 1e8, 1e10, 1e12]),
    ],
)
def test_ticks_are_round(values, is_log, ticks):
    assert Scale.of(Axis("x", values, is_log), 0.0, 1.0).ticks() == pytest.approx(ticks)


def test_whole_ticks():
    assert Scale.of(Axis("block", [0.0, 1.0], is_whole=True), 0.0, 1.0).ticks() == [0.0, 1.0]


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [-1.0, math.inf]])
def test_nothing_to_show_is_no_error(values):
    panel = Panel.begin("t", "d", Axis("x", values), Axis("y", values, is_log=True))
    assert panel.y.ticks()
    panel.add_point(1.0, values[0] if values else math.nan, 0, "never drawn")
    assert "never drawn" not in markup(panel.svg)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values", [[1e308, 1.0], [-1e308, 1e308], [1e-320, 1.0], [2.0**62, 2.0**62 + 1024], [1e-320]]
)
def test_values_at_the_ends_of_floats_are_no_error(values, is_log):
    panel = Panel.begin("t", "d", Axis("x", values), Axis("y", values, is_log=is_log))
    panel.add_line([(value, value) for value in values], 0)
    assert panel.y.ticks() == sorted(panel.y.ticks())


def test_a_point_without_a_place_leaves_a_gap():
    values = [1.0, 2.0, 0.0, 3.0, math.inf, 4.0]
    panel = Panel.begin("t", "d", Axis("x", [0.0, 5.0]), Axis("y", values, is_log=True))
    panel.add_line(((float(x), y) for x, y in enumerate(values)), 0)
    (path,) = fromstring(markup(panel.svg)).iter("path")
    assert [part[0] for part in path.get("d").split() if part[0].isalpha()] == ["M", "L", "M", "M"]


def test_axes_are_labelled():
    svg = markup(Panel.begin("title", "words", Axis("block", [0.0]), Axis("loss", [1.0])).svg)
    texts = [text.text for text in fromstring(svg).iter("text")]
    assert {"block", "loss"} <= set(texts)
    assert [fromstring(svg)[0].text, fromstring(svg)[1].text] == ["title", "words"]
