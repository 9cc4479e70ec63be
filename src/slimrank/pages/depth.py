"""What sequential runs know of their blocks: errors by depth, refinement, memory."""

from collections.abc import Callable, Sequence

from slimrank.pages.content import Chart, Table, legend_of
from slimrank.pages.panel import Axis, Panel
from slimrank.pages.svg import markup, viridis
from slimrank.pages.wording import in_bytes, in_percent, in_short, in_time
from slimrank.report import BlockError, BlockReport

Curve = tuple[str, int, str, dict[int, BlockError]]  # style, number, label, errors by block


def charts_of_errors(blocks: Sequence[BlockReport]) -> tuple[Chart, ...]:
    """Draw relative error and cosine distance of the blocks' outputs against depth."""
    measured: list[tuple[str, int, str, dict[int, BlockError | None]]] = [
        ("line", 0, "held-out text", {x.index: x.held_out for x in blocks}),
        ("line dotted", 1, "calibration text", {x.index: x.calibration for x in blocks}),
        (
            "line dashed",
            2,
            "before refinement",
            {x.index: x.unrefined_held_out or x.unrefined_calibration for x in blocks},
        ),
    ]
    curves: list[Curve] = []
    for style, number, label, errors in measured:
        known = {block: error for block, error in errors.items() if error is not None}
        if known:
            curves.append((style, number, label, known))
    return (
        _draw_errors(
            "Relative error of the blocks' outputs",
            "E ‖y − y'‖² / E ‖y‖², which large tokens dominate. Errors add up: a compressed block "
            "runs on what the compressed blocks before it give.",
            "relative error",
            curves,
            lambda error: error.relative_error,
        ),
        _draw_errors(
            "Cosine distance of the blocks' outputs",
            "Mean of 1 − cos(y, y'), in which all tokens count alike. A gap between held-out and "
            "calibration text is overfitting.",
            "cosine distance",
            curves,
            lambda error: error.cosine_distance,
        ),
    )


def _draw_errors(
    title: str,
    note: str,
    label: str,
    curves: Sequence[Curve],
    figure: Callable[[BlockError], float],
) -> Chart:
    blocks = [float(block) for *_, errors in curves for block in errors]
    values = [figure(error) for *_, errors in curves for error in errors.values()]
    panel = Panel.begin(
        title, note, Axis("block", blocks, is_whole=True), Axis(label, values, is_log=True)
    )
    for style, number, name, errors in curves:
        points = [(float(block), figure(error)) for block, error in errors.items()]
        panel.add_line(points, number, style, name)
        for x, y in points:
            words = f"block {x:.0f}, {name}: {in_short(y)}"
            panel.add_point(x, y, number, words, "mark small")
    legend = legend_of((style, number, name) for style, number, name, _ in curves)
    return Chart(title, note, markup(panel.svg), legend)


def charts_of_refinement(blocks: Sequence[BlockReport]) -> tuple[Chart, ...]:
    """Draw the loss of each refined block over its epochs, as a share of that at the start."""
    held_out: dict[int, list[float]] = {}
    training: dict[int, list[float]] = {}
    for block in blocks:
        found = block.refinement
        if found is None:
            continue
        if found.start_loss > 0:
            course = found.calibration_course
            training[block.index] = [loss / found.start_loss for loss in course]
        if found.start_held_out_loss:
            held_out[block.index] = [loss / found.course[0] for loss in found.course]
    kept = {x.index: x.refinement.kept_epoch for x in blocks if x.refinement is not None}
    titles = {
        "Refinement on calibration sequences": training,
        "Refinement on held-out sequences": held_out,
    }
    return tuple(
        _draw_courses(title, courses, kept) for title, courses in titles.items() if courses
    )


def _draw_courses(title: str, courses: dict[int, list[float]], kept: dict[int, int]) -> Chart:
    note = (
        "A line a block, dark blue for the first and light green for the last: block loss over "
        "that at the start. Dots are the epochs that were kept."
    )
    longest = max(map(len, courses.values()))
    values = [loss for course in courses.values() for loss in course]
    panel = Panel.begin(
        title,
        note,
        Axis("epoch", [float(epoch) for epoch in range(longest)], is_whole=True),
        Axis("loss / loss at the start", values),
    )
    first, last = min(courses), max(courses)
    for block, course in courses.items():
        colour = viridis(0.2 + 0.6 * (block - first) / max(last - first, 1))
        points = [(float(epoch), loss) for epoch, loss in enumerate(course)]
        panel.add_line(points, 0, "line fine", f"block {block}", colour)
        if kept[block] < len(points):
            epoch, loss = points[kept[block]]
            words = f"block {block}: epoch {epoch:.0f} kept, {in_percent(loss)} of the start"
            panel.add_point(epoch, loss, 7, words, "mark dot")
    return Chart(title, note, markup(panel.svg))


def table_of_blocks(blocks: Sequence[BlockReport]) -> Table:
    """Put the figures of each block into a row."""
    is_refined = any(block.refinement is not None for block in blocks)
    columns = ["block", "error, held out", "cosine, held out", "error, calibration"]
    columns += ["error unrefined", "kept epoch"] if is_refined else []
    rows = []
    for block in blocks:
        row = [
            block.name,
            in_short(block.held_out.relative_error if block.held_out else None),
            in_short(block.held_out.cosine_distance if block.held_out else None),
            in_short(block.calibration.relative_error),
        ]
        if is_refined:
            before = block.unrefined_held_out or block.unrefined_calibration
            row.append(in_short(before.relative_error if before else None))
            row.append(str(block.refinement.kept_epoch) if block.refinement else "–")
        seconds = sum(block.seconds.values())
        rows.append((*row, in_time(seconds), in_bytes(block.peak_bytes)))
    names = (*columns, "time", "peak memory so far")
    return Table("Figures of each block", names, tuple(rows), is_folded=True)
