"""What each ingredient of the best run pays: alone, and taken away."""

import math
from collections.abc import Iterator, Sequence

from slimrank.pages.content import Table
from slimrank.pages.frontier import FrontierReport, FrontierRun, by_size
from slimrank.pages.wording import in_bytes, in_short

INGREDIENTS = ("method", "allocation", "layout", "refine", "order")


def ingredients(run: FrontierRun) -> dict[str, str]:
    """Give the choices that runs of one size may differ in."""
    return {
        "method": run.method,
        "allocation": run.allocation,
        "layout": run.layout,
        "refine": run.refine or "off",
        "order": str(run.recipe.get("order") or "by default"),
    }


def tables_of_ablation(report: FrontierReport, text: str) -> tuple[Table, ...]:
    """Make a table for each size at which some run differs from best or plainest in one choice.

    The plainest run has uniform ranks, the plain layout and no refinement, and if there are several
    the method 'swift-svd' and one-shot order; each Δ is in ln perplexity over the dense model.
    """
    dense = report.dense()
    if dense is None or math.isnan(dense.on(text)):
        return ()
    runs = [run for run in report.runs if run.error is None and math.isfinite(run.on(text))]
    tables = []
    for size, own in by_size(runs).items():
        rows = list(_rows(own, text, dense.on(text)))
        if len(rows) > 2:
            columns = ("", "run", "perplexity", "Δ ln", "of plain", "weights")
            caption = f"Ingredients at keep {size}, on {text}"
            tables.append(Table(caption, columns, tuple(rows), num_names=2))
    return tuple(tables)


def _rows(runs: Sequence[FrontierRun], text: str, dense: float) -> Iterator[tuple[str, ...]]:
    best = min(runs, key=lambda run: run.on(text))
    plain = _plainest(runs, text)
    if plain is None:
        return

    def row(what: str, run: FrontierRun) -> tuple[str, ...]:
        rise, whole = math.log(run.on(text) / dense), math.log(plain.on(text) / dense)
        share = f"{rise / whole:.2f}" if whole > 0 else "–"
        figures = (in_short(run.on(text)), f"{rise:.3f}", share, in_bytes(run.bytes))
        return (what, run.name, *figures)

    yield row("plain", plain)
    for run in runs:
        changed = differences(plain, run)
        if len(changed) == 1 and run is not best:
            name = changed[0]
            yield row(f"plain, but {name} {ingredients(run)[name]}", run)
    for run in runs:
        changed = differences(best, run)
        if len(changed) == 1 and run is not plain:
            name = changed[0]
            yield row(f"best, but {name} {ingredients(run)[name]}", run)
    if best is not plain:
        yield row("best", best)


def _plainest(runs: Sequence[FrontierRun], text: str) -> FrontierRun | None:
    """Uniform, plain, unrefined, one-shot, best of swift-svd; else what most runs are next to."""
    plain = [
        run
        for run in runs
        if (run.allocation, run.layout, run.refine or "off") == ("uniform", "plain", "off")
    ]

    def plainness(run: FrontierRun) -> tuple[bool, bool, int, float]:
        near = [other for other in runs if len(differences(run, other)) == 1]
        is_one_shot = ingredients(run)["order"] != "sequential"
        return run.method == "swift-svd", is_one_shot, len(near), -run.on(text)

    return max(plain, key=plainness, default=None)


def differences(one: FrontierRun, other: FrontierRun) -> list[str]:
    """Choices that two runs do not share; the order counts for none where refinement asks for it.

    Examples
    --------
    >>> differences(FrontierRun(name="a", method="svd", layout="plain"),
    ...     FrontierRun(name="b", method="asvd", layout="plain"))
    ['method']
    """
    left, right = ingredients(one), ingredients(other)
    changed = [name for name in INGREDIENTS if left[name] != right[name]]
    return [name for name in changed if name != "order" or "refine" not in changed]
