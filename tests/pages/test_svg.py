"""Marks differ, colours grow lighter, and no text can leave its element."""

from xml.etree.ElementTree import Element, fromstring

from slimrank.pages.svg import SHAPES, add, add_mark, canvas, markup, swatch, viridis


def test_text_titles_and_attributes_are_escaped(hostile):
    svg = canvas(10.0, 10.0, hostile, hostile)
    add(svg, "text", hostile, title=hostile, class_=hostile)
    written = markup(svg)
    assert "<script" not in written
    assert "<img" not in written
    again = fromstring(written)
    assert again.get("aria-label") == again[0].text == again[1].text == hostile
    assert again[2].text == again[2][0].text == again[2].get("class") == hostile


def test_a_title_does_not_take_the_place_of_a_text():
    text = add(Element("g"), "text", "shown", title="said")
    assert (text.text, text[0].tag, text[0].text) == ("shown", "title", "said")


def test_each_series_has_a_mark_of_its_own():
    marks = set()
    for number in range(len(SHAPES)):
        group = Element("g")
        add_mark(group, 10.0, 10.0, number)
        group[0].set("class", "")
        marks.add(markup(group[0]))
    assert len(marks) == len(SHAPES)
    assert swatch(0) != swatch(1)
    assert "<line" in swatch(0, "line dashed")


def test_lightness_grows_with_the_share():
    def lightness(share):
        red, green, blue = bytes.fromhex(viridis(share)[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [lightness(number / 50) for number in range(51)]
    assert shades == sorted(shades)
    assert viridis(-1) == viridis(0)
    assert viridis(2) == viridis(1)
