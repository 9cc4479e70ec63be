"""Blocks across, kinds of linears down, and a colour for each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from markupsafe import Markup

from slimrank.pages.panel import Axis, Scale, tick_text
from slimrank.pages.svg import add, canvas, markup, viridis

ROW, MOST, LEAST, ROOM = 24.0, 44.0, 7.0, 940.0  # height, widths of cells, width of all of them
LETTER, SMALL_LETTER = 6.6, 5.6  # widths, about
BAR_WIDTH, BAR_SHADES, BETWEEN_TICKS = 220.0, 44, 30.0


@dataclass(frozen=True, slots=True)
class Cell:
    """The linears of one kind in one block.

    Parameters
    ----------
    block : int
    kind : str
    value : float or None
        What its colour says; None, and what has no place on the scale, is hatched.
    text : str
        Written into it where it has room.
    title : str
        Shown when the mouse rests on it.
    """

    block: int
    kind: str
    value: float | None
    text: str
    title: str


def draw_heat_map(
    cells: Sequence[Cell], name: str, description: str, values: Axis, hatched: str
) -> Markup:
    """Draw cells, and a bar that says what the colours are.

    Parameters
    ----------
    cells : sequence of Cell
    name, description : str
        Of the drawing, for a screen reader.
    values : Axis
        What the colours say, and have to span.
    hatched : str
        What it means that a cell has no colour.
    """
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    blocks = sorted({cell.block for cell in cells})
    column = min(max(ROOM / len(blocks), LEAST), MOST)
    left = LETTER * max(map(len, kinds)) + 14
    width = left + max(column * len(blocks), BAR_WIDTH + 190) + 8
    svg = canvas(width, ROW * len(kinds) + 76, name, description)
    _define_hatching(svg)
    for row, kind in enumerate(kinds):
        add(svg, "text", kind, class_="tick end", x=left - 8, y=ROW * row + ROW / 2 + 4)
    step = max(1, math.ceil(22 / column))
    for number, block in enumerate(blocks):
        if number % step == 0:
            x = left + column * (number + 0.5)
            add(svg, "text", str(block), class_="tick middle", x=x, y=ROW * len(kinds) + 15)
    scale = Scale.of(values, 0.0, 1.0)
    for cell in cells:
        place = (left + column * blocks.index(cell.block), ROW * kinds.index(cell.kind))
        _draw_cell(svg, cell, scale, place, column)
    middle = left + column * len(blocks) / 2
    add(svg, "text", "block", class_="axis", x=middle, y=ROW * len(kinds) + 32)
    _draw_bar(svg, scale, (left, ROW * len(kinds) + 42), (values.label, hatched))
    return markup(svg)


def _draw_cell(
    svg: Element, cell: Cell, scale: Scale, place: tuple[float, float], column: float
) -> None:
    share = None
    if cell.value is not None and scale.shows(cell.value):
        share = scale.place(cell.value)
    fill = "url(#dense)" if share is None else viridis(share)
    x, y = place
    size: dict[str, Any] = {"width": column - 1, "height": ROW - 1}
    add(svg, "rect", x=x, y=y, fill=fill, rx=1.5, title=cell.title, **size)
    if len(cell.text) * SMALL_LETTER + 2 <= column:
        look = "cell" if share is None else "cell light" if share < 0.55 else "cell dark"
        middle = x + (column - 1) / 2
        add(svg, "text", cell.text, class_=look, x=middle, y=y + ROW / 2 + 3)


def _define_hatching(svg: Element) -> None:
    size: dict[str, Any] = {"width": 5, "height": 5, "patternUnits": "userSpaceOnUse"}
    turned = "rotate(45)"
    pattern = add(add(svg, "defs"), "pattern", id="dense", patternTransform=turned, **size)
    add(pattern, "rect", class_="hatch-paper", width=5, height=5)
    add(pattern, "line", class_="hatch", x1=0, x2=0, y1=0, y2=5)


def _draw_bar(
    svg: Element, scale: Scale, place: tuple[float, float], words: tuple[str, str]
) -> None:
    (left, top), (unit, hatched) = place, words
    shade = BAR_WIDTH / BAR_SHADES
    for number in range(BAR_SHADES):
        colour = viridis((number + 0.5) / BAR_SHADES)
        add(svg, "rect", x=left + number * shade, y=top, width=shade + 0.3, height=10, fill=colour)
    last = -BAR_WIDTH
    for tick in scale.ticks():
        x = left + BAR_WIDTH * scale.place(tick)
        if x - last < BETWEEN_TICKS:
            continue
        last = x
        add(svg, "text", tick_text(tick), class_="tick middle", x=x, y=top + 23)
    add(svg, "text", unit, class_="tick", x=left + BAR_WIDTH + 12, y=top + 9)
    dense = left + BAR_WIDTH + 12
    add(svg, "rect", x=dense, y=top + 15, width=16, height=10, fill="url(#dense)", rx=1.5)
    add(svg, "text", hatched, class_="tick", x=dense + 22, y=top + 24)
