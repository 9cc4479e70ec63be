"""SVG as elements: whoever wrote the text in them, the XML writer escapes it."""

from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

NUM_COLOURS = 8
SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "hexagon")
OUTLINES = {
    "square": "-.85 -.85 .85 -.85 .85 .85 -.85 .85",
    "triangle": "0 -1.1 1.05 .8 -1.05 .8",
    "diamond": "0 -1.25 1.25 0 0 1.25 -1.25 0",
    "down": "0 1.1 1.05 -.8 -1.05 -.8",
    "plus": "-.35 -1.1 .35 -1.1 .35 -.35 1.1 -.35 1.1 .35 .35 .35 .35 1.1 -.35 1.1 -.35 .35 "
    "-1.1 .35 -1.1 -.35 -.35 -.35",
    "cross": "-1 -.5 -.5 -1 0 -.5 .5 -1 1 -.5 .5 0 1 .5 .5 1 0 .5 -.5 1 -1 .5 -.5 0",
    "hexagon": "-1 0 -.5 -.9 .5 -.9 1 0 .5 .9 -.5 .9",
}
VIRIDIS = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)


def canvas(width: float, height: float, title: str, description: str) -> Element:
    """Begin a drawing, with the name and the description that a screen reader speaks."""
    svg = Element("svg", {"class": "drawing", "role": "img", "aria-label": title})
    svg.set("viewBox", f"0 0 {_coordinate(width)} {_coordinate(height)}")
    svg.set("width", _coordinate(width))
    svg.set("height", _coordinate(height))
    add(svg, "title", text=title)
    add(svg, "desc", text=description)
    return svg


def add(
    parent: Element, tag: str, text: str = "", title: str = "", **attributes: object
) -> Element:
    """Put an element into another.

    Parameters
    ----------
    parent : Element
    tag : str
    text : str
        Inside it.
    title : str
        Shown when the mouse rests on it.
    **attributes
        ``class_`` is ``class``, ``_`` within a name is ``-``; numbers are rounded to what is seen.

    Examples
    --------
    >>> print(markup(add(Element("g"), "text", text="a<b", x=1 / 3, text_anchor="end")))
    <text x="0.33" text-anchor="end">a&lt;b</text>
    """
    element = SubElement(parent, tag)
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        element.set(name, _coordinate(value) if isinstance(value, float) else str(value))
    if title:
        add(element, "title", text=title)
    if text:
        element.text = text
    return element


def add_mark(
    parent: Element, x: float, y: float, number: int, title: str = "", style: str = "mark"
) -> None:
    """Draw the mark of the `number`-th series: a colour and a shape of its own."""
    shape = SHAPES[number % len(SHAPES)]
    look = f"{style} k{number % NUM_COLOURS}"
    if shape == "circle":
        add(parent, "circle", class_=look, cx=x, cy=y, r=4.2, title=title)
        return
    numbers = [4.2 * float(part) for part in OUTLINES[shape].split()]
    points = " ".join(
        f"{_coordinate(x + dx)},{_coordinate(y + dy)}"
        for dx, dy in zip(numbers[::2], numbers[1::2], strict=True)
    )
    add(parent, "polygon", class_=look, points=points, title=title)


def swatch(number: int, style: str = "mark") -> Markup:
    """Draw a mark, or a short line, alone, for a legend; the words beside it say what it is."""
    svg = Element("svg", {"viewBox": "0 0 24 12", "width": "24", "height": "12"})
    svg.set("aria-hidden", "true")
    if "line" in style.split():
        add(svg, "line", class_=f"{style} k{number % NUM_COLOURS}", x1=1, x2=23, y1=6, y2=6)
    else:
        add_mark(svg, 12.0, 6.0, number, style=style)
    return markup(svg)


def markup(element: Element) -> Markup:
    """Write an element for a page."""
    return Markup(tostring(element, encoding="unicode"))


def viridis(share: float | int) -> str:
    """Give the colour of a share: dark blue at 0, yellow at 1; monotone in lightness.

    Examples
    --------
    >>> viridis(0), viridis(0.5), viridis(1)
    ('#440154', '#21918c', '#fde725')
    """
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    mixed = (
        round(a + (place - low) * (b - a))
        for a, b in zip(VIRIDIS[low], VIRIDIS[low + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _coordinate(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
