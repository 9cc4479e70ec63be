"""A pair of axes, and what is drawn between them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from slimrank.pages.svg import NUM_COLOURS, add, add_mark, canvas
from slimrank.pages.wording import in_short

WIDTH, HEIGHT = 520.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 12.0, 44.0
MOST_TICKS = 7
LARGEST = 1e150  # number on an axis


@dataclass(frozen=True, slots=True)
class Axis:
    """What is on an axis.

    Parameters
    ----------
    label : str
    values : sequence of float
        All that it has to show; those that are not finite, or not positive on a logarithmic axis,
        count for nothing.
    is_log, is_whole : bool
        Logarithmic; ticks at whole numbers only.
    """

    label: str
    values: Sequence[float]
    is_log: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places.

    Parameters
    ----------
    low, high : float
        Values at the ends.
    start, end : float
        Places of the ends.
    is_log, is_whole : bool

    Examples
    --------
    >>> Scale(1.0, 100.0, 0.0, 10.0, is_log=True).place(10.0)
    5.0
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    is_whole: bool = False

    @classmethod
    def of(cls, axis: Axis, start: float, end: float) -> "Scale":
        """Leave a little room around the values of an axis."""
        shown = [value for value in axis.values if _has_place(value, axis.is_log)]
        low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
        if axis.is_log:
            room = max((high / low) ** 0.06, 1.02)
            return cls(low / room, high * room, start, end, is_log=True)
        room = 0.04 * (high - low)
        if room <= 1e-9 * abs(high):  # one value, or some that no axis tells apart
            room = 0.05 * abs(high) or 0.5
        if axis.is_whole:
            room = max(0.02 * (high - low), 0.4)
        return cls(low - room, high + room, start, end, is_whole=axis.is_whole)

    def shows(self, value: float) -> bool:
        """Whether a value has a place on it."""
        return _has_place(value, self.is_log)

    def place(self, value: float) -> float:
        """Where a value is."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to mark, seven at most.

        Examples
        --------
        >>> Scale(0.0, 1.0, 0.0, 1.0).ticks()
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> Scale(0.02, 30.0, 0.0, 1.0, is_log=True).ticks()
        [0.1, 1.0, 10.0]
        """
        if not self.is_log or self.high / self.low < 4:
            return self._even_ticks()
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high))
        step = max(1, math.ceil((last - first + 1) / MOST_TICKS))
        decades = [10.0**power for power in range(first, last + 1, step)]
        if len(decades) >= 3:
            return decades
        around = (k * 10.0**power for power in range(first - 1, last + 1) for k in (1, 2, 5))
        return [tick for tick in around if self.low <= tick <= self.high]

    def _even_ticks(self) -> list[float]:
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
        step = next(k * size for k in (1, 2, 5, 10) if span / (k * size) <= MOST_TICKS)
        if self.is_whole:
            step = max(1.0, float(math.ceil(step)))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _has_place(value: float, is_log: bool) -> bool:
    """Whether an axis can show a value: what is beyond would overflow."""
    return abs(value) < LARGEST and (value > 1 / LARGEST or not is_log)


@dataclass(frozen=True, slots=True)
class Panel:
    """A drawing with two scales."""

    svg: Element
    x: Scale
    y: Scale

    @classmethod
    def begin(
        cls, title: str, description: str, x: Axis, y: Axis, size: tuple[float, float] | None = None
    ) -> "Panel":
        """Draw frame, grid, ticks and labels."""
        width, height = size or (WIDTH, HEIGHT)
        panel = cls(
            canvas(width, height, title, description),
            Scale.of(x, LEFT, width - RIGHT),
            Scale.of(y, height - BOTTOM, TOP),
        )
        panel._mark_ticks()
        svg, middle = panel.svg, (TOP + height - BOTTOM) / 2
        add(svg, "text", x.label, class_="axis", x=(LEFT + width - RIGHT) / 2, y=height - 8)
        turned = f"rotate(-90 14 {middle:.0f})"
        add(svg, "text", y.label, class_="axis", x=14, y=middle, transform=turned)
        return panel

    def _mark_ticks(self) -> None:
        x, y, svg = self.x, self.y, self.svg
        for tick in x.ticks():
            place = x.place(tick)
            add(svg, "line", class_="grid", x1=place, x2=place, y1=y.start, y2=y.end)
            text = str(round(tick)) if x.is_whole else tick_text(tick)
            add(svg, "text", text, class_="tick middle", x=place, y=y.start + 16)
        for tick in y.ticks():
            place = y.place(tick)
            add(svg, "line", class_="grid", x1=x.start, x2=x.end, y1=place, y2=place)
            add(svg, "text", tick_text(tick), class_="tick end", x=x.start - 7, y=place + 3.8)
        add(svg, "line", class_="frame", x1=x.start, x2=x.end, y1=y.start, y2=y.start)
        add(svg, "line", class_="frame", x1=x.start, x2=x.start, y1=y.start, y2=y.end)

    def add_line(
        self,
        points: Iterable[tuple[float, float]],
        number: int,
        style: str = "line",
        title: str = "",
        colour: str | None = None,
    ) -> None:
        """Connect points; those that have no place leave a gap."""
        moves, drawn = [], False
        for x, y in points:
            shown = self.x.shows(x) and self.y.shows(y)
            if shown:
                command = "L" if drawn else "M"
                moves.append(f"{command}{self.x.place(x):.1f} {self.y.place(y):.1f}")
            drawn = shown
        own = {"color": colour} if colour else {}
        look = style if colour else f"{style} k{number % NUM_COLOURS}"
        if moves:
            add(self.svg, "path", class_=look, d=" ".join(moves), title=title, **own)

    def add_point(
        self, x: float, y: float, number: int, title: str = "", style: str = "mark"
    ) -> None:
        """Draw a mark, if it has a place."""
        if self.x.shows(x) and self.y.shows(y):
            add_mark(self.svg, self.x.place(x), self.y.place(y), number, title, style)


def tick_text(value: float) -> str:
    """Shortest text of a round number.

    Examples
    --------
    >>> [tick_text(x) for x in (0.2, 1.0, 250.0, 20000.0, 1e-6)]
    ['0.2', '1', '250', '20,000', '1e-06']
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return in_short(value).replace(".0e", "e")
    return f"{value:,.10g}"
