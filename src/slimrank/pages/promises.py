"""What the singular values promised, and what the factors give."""

from collections.abc import Sequence

from slimrank.pages.content import Chart, legend_of
from slimrank.pages.panel import Axis, Panel
from slimrank.pages.svg import markup
from slimrank.report import LinearReport


def chart_of_promises(linears: Sequence[LinearReport], is_trained: bool) -> Chart:
    """Draw measured loss against the loss that the singular values promised.

    Parameters
    ----------
    linears : sequence of LinearReport
    is_trained : bool
        Whether the run went on to train their factors.
    """
    low_rank = [x for x in linears if x.rank is not None and x.predicted_loss > 0]
    title = "Predicted and measured loss"
    predicted = [x.predicted_loss for x in low_rank]
    measured = [x.measured_loss for x in low_rank]
    stored = [x.stored_loss for x in low_rank if x.stored_loss is not None]
    gap = max((abs(x.measured_loss / x.predicted_loss - 1) for x in low_rank), default=0.0)
    rounded = max(
        (abs(x.stored_loss / x.measured_loss - 1) for x in low_rank if x.stored_loss), default=0.0
    )
    note = (
        "Each mark is a linear; on the line, the singular values promised what the factors give. "
        f"Largest gap: {gap:.1g} of the loss; after rounding to the stored dtype, {rounded:.1g}."
    )
    if is_trained:
        note += " All are losses of the factors before training."
    ends = [value for value in (*predicted, *measured) if value > 0]
    panel = Panel.begin(
        title,
        note,
        Axis("predicted loss", predicted, is_log=True),
        Axis("measured loss", [*measured, *stored], is_log=True),
    )
    if ends:
        panel.add_line([(min(ends), min(ends)), (max(ends), max(ends))], 7, style="line thin")
    for x in low_rank:
        if x.stored_loss is not None:
            panel.add_point(x.predicted_loss, x.stored_loss, 1, style="mark hollow")
    for x in low_rank:
        words = f"{x.name}\npredicted {x.predicted_loss:.6g}, measured {x.measured_loss:.6g}"
        panel.add_point(x.predicted_loss, x.measured_loss, 0, words)
    legend = [("mark", 0, "float64 factors")]
    if stored:
        legend.append(("mark hollow", 1, "factors as stored"))
    return Chart(title, note, markup(panel.svg), legend_of(legend))
