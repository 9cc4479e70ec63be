"""What a page is made of: facts, sections, tables and charts, all of them ready to be shown."""

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from slimrank.pages.svg import swatch


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of the headline, and a line that says of what."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A mark that a chart uses, as an SVG of its own, and what it stands for."""

    swatch: Markup
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing, with what it shows and how to read it.

    Parameters
    ----------
    title, note : str
    svg : Markup
        Escaped already.
    legend : tuple of LegendEntry
    is_wide : bool
        Takes a row of its own, at its own size.
    """

    title: str
    note: str
    svg: Markup
    legend: tuple[LegendEntry, ...] = ()
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text.

    Parameters
    ----------
    caption : str
    columns : tuple of str
    rows : tuple of tuple of str
        Cells that are `Markup` are escaped already, all others are text.
    num_names : int
        So many columns at the left are names, all others are figures.
    is_folded : bool
        Shown when it is asked for, and when the page is printed.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it; `code` is shown as it is."""

    title: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    code: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Parameters
    ----------
    kind, title, subtitle : str
    facts : tuple of Fact
    sections : tuple of Section
    warnings : tuple of str
    """

    kind: str
    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()


def legend_of(entries: Iterable[tuple[str, int, str]]) -> tuple[LegendEntry, ...]:
    """Make a legend of styles, numbers of series, and labels."""
    return tuple(LegendEntry(swatch(number, style), label) for style, number, label in entries)


def strong(text: str) -> Markup:
    """Make a cell of a table that stands out.

    Examples
    --------
    >>> strong("a < b")
    Markup('<strong>a &lt; b</strong>')
    """
    return Markup("<strong>{}</strong>").format(text)
