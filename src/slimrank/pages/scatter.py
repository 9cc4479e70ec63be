"""Perplexity against bytes, a mark a run, and the front."""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from slimrank.pages.content import Chart, legend_of
from slimrank.pages.frontier import FrontierReport, FrontierRun, by_size, front
from slimrank.pages.panel import Axis, Panel
from slimrank.pages.svg import add, markup
from slimrank.pages.wording import in_bytes, in_short, in_time

WIDE, NORMAL = (1160.0, 480.0), (520.0, 360.0)
SPREAD = 60.0  # worst perplexity that has its own place, over the best
LETTER, LINE = 6.0, 13.0  # of labels, about


def chart_of_runs(report: FrontierReport, text: str, is_wide: bool) -> Chart:
    """Draw all runs that were measured on a text.

    Runs worse than `SPREAD` times the best are drawn at the upper edge; their figures are in the
    table and under the mouse.
    """
    runs = [run for run in report.runs if run.error is None and not math.isnan(run.on(text))]
    best = min((run.on(text) for run in runs), default=1.0)
    ceiling = min(SPREAD * best, max((run.on(text) for run in runs), default=10.0))
    above = [run for run in runs if run.on(text) > ceiling]
    title = f"Perplexity on {text}" + (" (in domain)" if report.is_in_domain(text) else "")
    note = (
        "Further down is better, further left is smaller. On the solid line no other compressed "
        "model is both smaller and better; the dashed one counts dense baselines too."
    )
    if above:
        note += f" {len(above)} at the upper edge are worse than {in_short(ceiling)}."
    panel = Panel.begin(
        title,
        note,
        Axis("weights, MB", [run.bytes / 1e6 for run in runs]),
        Axis("perplexity", [min(run.on(text), ceiling) for run in runs], is_log=True),
        WIDE if is_wide else NORMAL,
    )
    low_rank = [run for run in runs if not run.is_dense]
    _draw_front(panel, runs, text, ceiling, "line front dashed")
    _draw_front(panel, low_rank, text, ceiling, "line front")
    methods = list(dict.fromkeys(run.method for run in report.runs if not run.is_dense))
    for run in runs:
        place = (run.bytes / 1e6, min(run.on(text), ceiling))
        if run.is_dense:
            panel.add_point(*place, 3, _in_words(run, text), "mark baseline")
        else:
            style = "mark hollow" if run.int8_factors else "mark"
            panel.add_point(*place, methods.index(run.method), _in_words(run, text), style)
    baselines = [run for run in runs if run.is_dense]
    best_runs = [min(own, key=lambda run: run.on(text)) for own in reversed(by_size(runs).values())]
    _name_points(panel, [*baselines, *best_runs] if is_wide else baselines, text, ceiling)
    entries = [("mark", number, method) for number, method in enumerate(methods)]
    rounded = any(run.int8_factors for run in runs)
    entries += [("mark hollow", 0, "hollow: int8 factors")] if rounded else []
    entries += [("mark baseline", 3, "dense baseline")] if baselines else []
    return Chart(title, note, markup(panel.svg), legend_of(entries), is_wide)


def _draw_front(
    panel: Panel, runs: Sequence[FrontierRun], text: str, ceiling: float, style: str
) -> None:
    """Draw the front of some runs as steps: what is reached at each size."""
    points: list[tuple[float, float]] = []
    for run in front(runs, lambda run: run.on(text)):
        x, y = run.bytes / 1e6, min(run.on(text), ceiling)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    panel.add_line(points, 7, style)


def _name_points(panel: Panel, runs: Sequence[FrontierRun], text: str, ceiling: float) -> None:
    """Write names beside marks, where they do not cover one that is written already."""
    taken: list[tuple[float, float, float, float]] = []
    for run in runs:
        x = panel.x.place(run.bytes / 1e6)
        y = panel.y.place(min(run.on(text), ceiling))
        width = LETTER * len(run.name)
        to_the_right = x + 9 + width < panel.x.end
        start = x + 9 if to_the_right else x - 9 - width
        for lower in (15.0, -6.0, 28.0):
            box = (start, y + lower - LINE + 3, start + width, y + lower + 3)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                _write(panel.svg, run.name, x + 9 if to_the_right else x - 9, y + lower)
                if not to_the_right:
                    panel.svg[-1].set("text-anchor", "end")
                break


def _write(svg: Element, name: str, x: float, y: float) -> None:
    add(svg, "text", name, class_="label", x=x, y=y)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _in_words(run: FrontierRun, text: str) -> str:
    return (
        f"{run.name}\nperplexity {in_short(run.on(text))}, {in_bytes(run.bytes)}, "
        f"keep {run.size}\n{run.method}, {run.allocation} ranks, {run.layout} layout, "
        f"refine {run.refine or 'off'}, {in_time(run.seconds)}"
        if not run.is_dense
        else f"{run.name}\nperplexity {in_short(run.on(text))}, {in_bytes(run.bytes)}"
    )
