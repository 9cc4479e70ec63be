"""What a run took: seconds by phase, and the search for its ranks."""

from collections.abc import Mapping

from slimrank.pages.content import Chart, legend_of
from slimrank.pages.panel import Axis, Panel
from slimrank.pages.svg import add, canvas, markup
from slimrank.pages.wording import in_percent, in_short, in_time
from slimrank.report import AllocationReport

WIDTH, ROW, NAMES, FIGURES = 520.0, 26.0, 100.0, 120.0


def chart_of_phases(seconds: Mapping[str, float]) -> Chart:
    """Draw a bar for each phase, longest first."""
    total = sum(seconds.values())
    title, note = "Time by phase", f"{in_time(total)} in all phases."
    longest = max(seconds.values(), default=0.0) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    svg = canvas(WIDTH, ROW * len(ordered) + 8, title, note)
    for number, (phase, taken) in enumerate(ordered):
        y = ROW * number + 6
        width = max(1.0, (WIDTH - NAMES - FIGURES) * taken / longest)
        add(svg, "text", phase, class_="tick end", x=NAMES - 8, y=y + 12)
        add(svg, "rect", class_="bar k0", x=NAMES, y=y, width=width, height=16, rx=2)
        words = f"{in_time(taken)} ({in_percent(taken / (total or 1.0))})"
        add(svg, "text", words, class_="tick", x=NAMES + width + 7, y=y + 12)
    return Chart(title, note, markup(svg))


def chart_of_search(allocation: AllocationReport) -> Chart:
    """Draw the perplexity of each α that was tried."""
    title = "Search for the ranks"
    note = (
        f"Perplexity on {allocation.held_out_tokens:,} held-out tokens of the calibration text, by "
        f"the weight of importance; {allocation.importance_weight:g} was taken."
    )
    weights = [trial.importance_weight for trial in allocation.trials]
    found = [trial.perplexity for trial in allocation.trials]
    uniform = allocation.uniform_perplexity
    panel = Panel.begin(
        title,
        note,
        Axis("importance weight α", weights),
        Axis("perplexity", [*found, *([] if uniform is None else [uniform])], is_log=True),
    )
    legend = [("mark", 0, "allocation swift")]
    if uniform is not None:
        panel.add_line([(min(weights), uniform), (max(weights), uniform)], 7, "line dashed")
        legend.append(("line dashed", 7, "uniform ranks"))
    panel.add_line(zip(weights, found, strict=True), 0)
    for weight, perplexity in zip(weights, found, strict=True):
        panel.add_point(weight, perplexity, 0, f"α {weight:g}: {in_short(perplexity)}")
    return Chart(title, note, markup(panel.svg), legend_of(legend))
