"""The page of a benchmark of many runs."""

import json
import math
from collections.abc import Sequence

from slimrank.pages.ablation import tables_of_ablation
from slimrank.pages.content import Fact, Page, Section, Table, strong
from slimrank.pages.frontier import FrontierReport, FrontierRun, TaskAccuracy, by_size
from slimrank.pages.scatter import chart_of_runs
from slimrank.pages.wording import in_bytes, in_short, in_time


def frontier_page(report: FrontierReport) -> Page:
    """Lay out all that a benchmark holds."""
    texts = report.texts()
    charts = tuple(chart_of_runs(report, text, text == texts[0]) for text in texts)
    sections = [
        Section("Perplexity against size", charts=charts, tables=_best_at_each_size(report)),
        Section(
            "All runs",
            f"Best on {texts[0]} first; bold figures are the best of their table." if texts else "",
            tables=_tables_of_runs(report),
        ),
    ]
    ablation = tables_of_ablation(report, texts[0]) if texts else ()
    if ablation:
        sections.append(
            Section(
                "What each ingredient pays",
                "Runs that differ in one choice from the plainest run of their size, then from the "
                "best. Δ ln is ln(perplexity / dense perplexity): the rise of the loss, in nats a "
                "token; beside it, its share of the plainest run's.",
                tables=ablation,
            )
        )
    if report.tasks():
        sections.append(_accuracy(report))
    sections.append(_provenance(report))
    return Page(
        kind="Frontier of sizes",
        title=report.model,
        subtitle=" · ".join(part for part in (f"{len(report.runs)} runs", report.date) if part),
        facts=_facts(report),
        sections=tuple(sections),
        warnings=tuple(f"{run.name} failed: {run.error}" for run in report.runs if run.error),
    )


def _facts(report: FrontierReport) -> tuple[Fact, ...]:
    facts, dense, texts = [], report.dense(), report.texts()
    if dense is not None and texts:
        others = ", ".join(f"{in_short(dense.on(text))} on {text}" for text in texts[1:])
        note = f"on {texts[0]}{'; ' if others else ''}{others}; {in_bytes(dense.bytes)}"
        facts.append(Fact("perplexity of the dense model", in_short(dense.on(texts[0])), note))
    for size, run in _best(report)[:4]:
        note = f"on {texts[0]}: {run.name}, {in_bytes(run.bytes)}"
        facts.append(Fact(f"best at keep {size}", in_short(run.on(texts[0])), note))
    seconds = sum(run.seconds for run in report.runs)
    facts.append(Fact("time of all runs", in_time(seconds), f"{len(report.runs)} runs"))
    return tuple(facts)


def _best(report: FrontierReport) -> list[tuple[str, FrontierRun]]:
    """Give the best compressed run on the first text at each size, large sizes first."""
    texts = report.texts()
    runs = [r for r in report.runs if texts and not r.error and not math.isnan(r.on(texts[0]))]
    groups = by_size(runs).items()
    return [(size, min(own, key=lambda run: run.on(texts[0]))) for size, own in groups]


def _best_at_each_size(report: FrontierReport) -> tuple[Table, ...]:
    texts, dense = report.texts(), report.dense()
    rows = []
    for size, run in _best(report):
        figures = [in_short(run.on(text)) for text in texts]
        rise = "–"
        if dense is not None and run.on(texts[0]) > 0:
            rise = in_short(math.log(run.on(texts[0]) / dense.on(texts[0])))
        rows.append((size, run.name, in_bytes(run.bytes), rise, *figures))
    if not rows:
        return ()
    columns = ("keep", "run", "weights", "Δ ln", *texts)
    return (Table(f"Best on {texts[0]} at each size", columns, tuple(rows), num_names=2),)


def _tables_of_runs(report: FrontierReport) -> tuple[Table, ...]:
    """Make a table of the baselines, and one for each size."""
    runs = [run for run in report.runs if run.error is None]
    groups = {"Dense baselines": [run for run in runs if run.is_dense]}
    groups |= {f"Keep {size}": own for size, own in by_size(runs).items()}
    return tuple(_table(caption, own, report.texts()) for caption, own in groups.items() if own)


def _table(caption: str, runs: Sequence[FrontierRun], texts: Sequence[str]) -> Table:
    """Put each run into a row, by perplexity on the first text; those without one come last."""

    def rank(run: FrontierRun) -> tuple[bool, float]:
        figure = run.on(texts[0]) if texts else math.nan
        return math.isnan(figure), 0.0 if math.isnan(figure) else figure

    best = {text: min((r.on(text) for r in runs if r.on(text) > 0), default=0) for text in texts}
    rows = []
    for run in sorted(runs, key=rank):
        perplexities = [
            strong(in_short(run.on(text))) if run.on(text) == best[text] else in_short(run.on(text))
            for text in texts
        ]
        choices = (run.method, run.allocation, run.layout, run.refine)
        costs = (
            in_time(run.seconds) if run.seconds else "–",
            in_bytes(run.peak_bytes) if run.peak_bytes else "–",
        )
        named = (choice or "–" for choice in choices)
        rows.append((run.name, *named, in_bytes(run.bytes), *perplexities, *costs))
    marked = (f"{text} ▲" if text == texts[0] else text for text in texts)
    columns = ("run", "method", "ranks", "layout", "refine", "weights", *marked)
    return Table(caption, (*columns, "time", "peak memory"), tuple(rows), num_names=5)


def _accuracy(report: FrontierReport) -> Section:
    """Sort by size, and within a size by the mean of the tasks that were measured."""
    tasks = report.tasks()
    runs = [run for run in report.runs if run.accuracy and run.error is None]
    counts = {task: max(r.accuracy[task].n for r in runs if task in r.accuracy) for task in tasks}
    ordered = sorted(
        runs,
        key=lambda run: (
            not run.is_dense,
            -run.keep,
            -sum(x.value for x in run.accuracy.values()) / len(run.accuracy),
        ),
    )
    rows = []
    for run in ordered:
        cells = [_with_error(run.accuracy.get(task)) for task in tasks]
        mean = _mean(run) if len(run.accuracy) == len(tasks) else None
        rows.append((run.name, in_bytes(run.bytes), _with_error(mean), *cells))
    columns = ("run", "weights", "mean ▼", *(f"{task} ({counts[task]:,})" for task in tasks))
    table = Table("Accuracy in percent ± one standard error", columns, tuple(rows))
    return Section(
        "Zero-shot accuracy",
        "Number of questions in brackets. Best of each size first. The error of a mean takes the "
        "tasks as independent.",
        tables=(table,),
    )


def _mean(run: FrontierRun) -> TaskAccuracy:
    found = run.accuracy.values()
    return TaskAccuracy(
        value=sum(x.value for x in found) / len(found),
        stderr=math.sqrt(sum(x.stderr**2 for x in found)) / len(found),
        n=sum(x.n for x in found),
    )


def _with_error(found: TaskAccuracy | None) -> str:
    return f"{100 * found.value:.1f} ± {100 * found.stderr:.1f}" if found else "–"


def _provenance(report: FrontierReport) -> Section:
    rows = tuple((str(key), _as_text(value)) for key, value in report.environment.items())
    settings = tuple((str(key), _as_text(value)) for key, value in report.settings.items())
    tables = [
        Table(caption, ("what", "value"), values, num_names=2)
        for caption, values in (("Environment", rows), ("Settings", settings))
        if values
    ]
    return Section("Where and how", tables=tuple(tables))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
