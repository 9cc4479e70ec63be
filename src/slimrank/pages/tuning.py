"""The training of all blocks together: its course over the epochs, and what it brought."""

from slimrank.pages.content import Chart, Fact, legend_of
from slimrank.pages.panel import Axis, Panel
from slimrank.pages.svg import markup
from slimrank.pages.wording import in_short
from slimrank.report import RefinementReport


def fact_of_tuning(found: RefinementReport) -> Fact:
    """Say what it brought, on held-out text if there is any.

    Examples
    --------
    >>> from slimrank.report import RefinementEpoch
    >>> epoch = RefinementEpoch(loss=0.05, held_out_loss=0.045, seconds=1.0)
    >>> fact_of_tuning(RefinementReport(loss="kl", start_loss=0.1, start_held_out_loss=0.123,
    ...     epochs=(epoch,), kept_epoch=1, trained_params=9, seconds=1.0)).note
    'all blocks trained together: 0.123 → 0.0450 nats a token on held-out text, epoch 1 of 1 kept'
    """
    start, kept = in_short(found.course[0]), in_short(found.kept_loss)
    which = f"epoch {found.kept_epoch} of {len(found.epochs)} kept"
    if found.kept_epoch == 0:
        which = "the start kept, for no epoch was better"
    return Fact(
        "prediction divergence",
        kept,
        f"all blocks trained together: {start} → {kept} nats a token on "
        f"{found.course_text} text, {which}",
    )


def chart_of_tuning(found: RefinementReport) -> Chart:
    """Draw the divergence from the original's predictions over the epochs."""
    title = "Training of all blocks together"
    note = (
        "How far the model's predictions are from the original's; epoch 0 is the start. On "
        "calibration sequences it is the mean over the steps of an epoch. The dot is the epoch "
        "that was kept."
    )
    curves = [("line dotted", 1, "calibration sequences", found.calibration_course)]
    if found.course_text == "held-out":
        curves.insert(0, ("line", 0, "held-out sequences", found.course))
    panel = Panel.begin(
        title,
        note,
        Axis("epoch", [float(epoch) for epoch in range(len(found.course))], is_whole=True),
        Axis("divergence, nats a token", [loss for *_, losses in curves for loss in losses]),
    )
    for style, number, label, losses in curves:
        panel.add_line(((float(epoch), loss) for epoch, loss in enumerate(losses)), number, style)
        for epoch, loss in enumerate(losses):
            words = f"epoch {epoch}, {label}: {in_short(loss)}"
            panel.add_point(float(epoch), loss, number, words, "mark small")
    words = f"epoch {found.kept_epoch} kept: {in_short(found.kept_loss)}"
    panel.add_point(float(found.kept_epoch), found.kept_loss, 0, words, "mark kept")
    legend = [(style, number, label) for style, number, label, _ in curves]
    legend.append(("mark kept", 0, "kept"))
    return Chart(title, note, markup(panel.svg), legend_of(legend))
