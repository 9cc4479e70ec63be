"""Perplexity against bytes, the Pareto front marked: an SVG by matplotlib."""

import io
import itertools
from pathlib import Path
from typing import Any

from slimrank.checkpoint.durable import write_durably
from slimrank.frontier.result import FrontierReport, FrontierRun
from slimrank.plots import make_panels

PLOT = "frontier.svg"
MARKERS = "osD^vP*X"
BASELINES = {"dense": "k", "int8": "0.45"}


def write_plot(report: FrontierReport, folder: Path) -> Path:
    """Write the picture of `draw_frontier` beside the results, in place of an earlier one.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    SlimrankError
        If matplotlib is not installed.
    CheckpointError
        If the disk is full or refuses.
    """
    write_durably(folder, PLOT, frontier_svg(report))
    return folder / PLOT


def frontier_svg(report: FrontierReport) -> bytes:
    """Picture of `draw_frontier` as SVG; the same report gives the same bytes."""
    figure = draw_frontier(report)
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "slimrank"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def draw_frontier(report: FrontierReport) -> Any:
    """One panel a text: bytes across, perplexity up (logarithmic), a colour and marker a method.

    Markers of models with int8 factors are hollow.

    The fronts are of the panel's own text: one of all runs, one of those of low rank. Texts of the
    kind that was calibrated on say so.
    """
    texts = report.texts
    figure, panels = make_panels(len(texts), (2.0 + 4.6 * min(len(texts), 4), 5.2))
    runs = [run for run in report.runs if run.error is None]
    methods = list(dict.fromkeys(run.method for run in runs if not run.is_dense))
    for text, axes in zip(texts, panels, strict=True):
        for method, is_int8 in itertools.product([*BASELINES, *methods], (False, True)):
            own = [r for r in runs if (r.method, r.int8_factors) == (method, is_int8)]
            if own:
                axes.plot(
                    [run.bytes / 1e6 for run in own],
                    [run.perplexity[text].value for run in own],
                    linestyle="none",
                    label=f"{method}, int8" if is_int8 else method,
                    fillstyle="none" if is_int8 else "full",
                    **_look(method, methods),
                )
        for label, style, candidates in (
            ("Pareto front", "-", runs),
            ("of low rank", "--", [run for run in runs if not run.is_dense]),
        ):
            front = _front(candidates, text)
            axes.step(
                [run.bytes / 1e6 for run in front],
                [run.perplexity[text].value for run in front],
                where="post",
                linestyle=style,
                color="0.3",
                linewidth=1.0,
                zorder=0,
                label=label,
            )
        axes.set_yscale("log")
        note = " (in domain)" if report.settings["texts"][text]["in_domain"] else ""
        axes.set(xlabel="weights, MB", ylabel="perplexity", title=f"{text}{note}")
        axes.grid(visible=True, which="both", alpha=0.25)
    panels[0].legend(fontsize="small")
    figure.suptitle(f"Perplexity against bytes: {report.model}".replace("$", r"\$"))
    return figure


def _look(method: str, methods: list[str]) -> dict[str, Any]:
    if method in BASELINES:
        return {"color": BASELINES[method], "marker": "s", "markersize": 8}
    number = methods.index(method)
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def _front(runs: list[FrontierRun], text: str) -> list[FrontierRun]:
    """Runs of the front on a text, small ones first."""
    front: list[FrontierRun] = []
    for run in sorted(runs, key=lambda run: (run.bytes, run.perplexity[text].value)):
        if not front or run.perplexity[text].value < front[-1].perplexity[text].value:
            front.append(run)
    return front
