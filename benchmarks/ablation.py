"""What each ingredient is worth: layout, metric of the solve, allocation and its unit, refinement.

    python benchmarks/ablation.py SUITE MODEL --calibration FILE --test FILE --other FILE --out F

A suite is a list of rows (see `_rows`); texts are those of `objectives.py`.
"""

from typing import Any

import _rows
from _rows import plainly

SAME = {"sequences": 48}
DEFAULT = {**SAME, "method": "kfac-svd", "allocation": "global", "layout": "auto"}
TWICE = {**DEFAULT, "passes": 2}
PUBLISHED = {**SAME, "method": "swift-svd", "refine": {"preset": "paper", "epochs": 10}}
KEEP = (0.8, 0.6, 0.4)
TUNE: dict[str, Any] = {"tune": {}}


OWN = {**TWICE, "generated_sequences": 96}
OWN_TUNED: dict[str, Any] = {**OWN, "tune": {"epochs": 8}}
BEST_EFFORT = {**OWN_TUNED, "generated_sequences": 128, "refine": "fast"}  # as --effort best


def unit(name: str) -> dict[str, Any]:
    return {"allocation": "global", "global_ranks": {"unit": name}}


def search(_: float | None) -> list[dict[str, Any]]:
    """Damping, ridge, labels and the rate of tuning; chosen by text that no run has seen."""
    rows: list[dict[str, Any]] = [{**DEFAULT, "damping": size} for size in (1e-3, 1e-1, 1e-4)]
    rows += [{**DEFAULT, "ridge": size} for size in (0.01, 0.1)]
    rows += [{**DEFAULT, "gradients": {"labels": "model"}}]
    rows += [{**DEFAULT, "keep": 0.6, "damping": size} for size in (1e-3, 1e-1)]
    rows += [{**DEFAULT, "keep": 0.6, "ridge": size} for size in (0.01,)]
    rates = [{"learning_rate": rate} for rate in (1e-4, 2e-4)]
    return rows + [{**TWICE, "keep": 0.6, "tune": how} for how in rates]


def headline(_: float | None) -> list[dict[str, Any]]:
    """The default, what a second pass and training add, the published recipe, and uniform ranks."""
    rows: list[dict[str, Any]] = []
    for keep in (0.6, 0.8, 0.4):
        rows += [{**row, "keep": keep} for row in ({**TWICE, **TUNE}, TWICE, UNIFORM)]
    rows += [{**TWICE, "keep": 0.6, "refine": "fast", **TUNE}]
    rows += [{**TWICE, "keep": 0.6, "refine": "fast"}]
    rows += [{**DEFAULT, "keep": 0.4}, {**PUBLISHED, "keep": 0.4}]
    rows += [{**TWICE, "keep": 0.6, "method": "kfac-aa-svd"}, {**DEFAULT, "keep": 0.6, **TUNE}]
    for keep in KEEP:
        rows += [{**DEFAULT, "keep": keep}, {**PUBLISHED, "keep": keep}]
        rows += [{**TWICE, "keep": keep, "refine": "fast", **TUNE}]
        rows += [{**TWICE, "keep": keep, "refine": "fast"}]
    return rows


def generated(_: float | None) -> list[dict[str, Any]]:
    """Sequences of the model's own beside the text, with and without training."""
    rows = [{**OWN_TUNED, "keep": keep} for keep in (0.6, 0.8)]
    rows += [{**OWN, "keep": keep} for keep in (0.6, 0.8)]
    rows += [{**OWN, "passes": 1, "keep": keep} for keep in (0.6, 0.8)]
    rows += [{**UNIFORM, "generated_sequences": 96, "keep": keep} for keep in (0.6, 0.8)]
    return rows + [{**row, "keep": 0.4} for row in (OWN_TUNED, OWN)]


def best(_: float | None) -> list[dict[str, Any]]:
    """The highest effort."""
    return [{**BEST_EFFORT, "keep": keep} for keep in (0.6, 0.8, 0.4)]


def parts(_: float | None) -> list[dict[str, Any]]:
    """Each ingredient alone, and each left out, without training."""
    rows: list[dict[str, Any]] = []
    for keep in (0.6, 0.8):
        for layout in ("plain", "auto"):
            for method in ("swift-svd", "kfac-svd"):
                same = {**SAME, "keep": keep, "method": method, "layout": layout}
                rows += [same, {**same, "allocation": "global"}]
        plain = {**SAME, "keep": keep, "method": "swift-svd"}
        rows += [{**plain, **unit("relative")}, {**plain, **unit("gradient")}]
        rows += [{**DEFAULT, "keep": keep, "global_ranks": {"may_stay_dense": False}}]
        rows += [{**plain, "passes": 2}]
    return rows


def losses(_: float | None) -> list[dict[str, Any]]:
    """What a block is trained by, from the default."""
    ways = ({}, {"loss": "gradient"}, {"loss": "kl", "epochs": 2})
    return [
        {**DEFAULT, "keep": keep, "refine": {"preset": "fast", **how} if how else "fast"}
        for keep in (0.6, 0.8)
        for how in ways
    ]


def guard(_: float | None) -> list[dict[str, Any]]:
    """A share of the input-agnostic objective, where more than one pass or text is at hand."""
    rows = (DEFAULT, TWICE, OWN)
    return [{**row, "keep": keep, "ridge": 0.01} for keep in (0.6, 0.8) for row in rows]


def steady(_: float | None) -> list[dict[str, Any]]:
    """Seeds and tokens."""
    rows: list[dict[str, Any]] = []
    for keep in (0.6, 0.8):
        for row in (OWN_TUNED, UNIFORM, DEFAULT, TWICE, OWN, PUBLISHED):
            rows += [{**row, "keep": keep, "seed": seed} for seed in (1, 2)]
    for keep in (0.6, 0.8):
        rows += [{**row, "keep": keep, "sequences": 192} for row in (UNIFORM, DEFAULT, TWICE)]
    return rows


UNIFORM = {**SAME, "method": "swift-svd"}
ANCHORED = {**DEFAULT, "method": "kfac-aa-svd"}


def peers(_: float | None) -> list[dict[str, Any]]:
    """Every other method at the same tokens, as its paper has it: uniform ranks, plain layout."""
    names = ("svd", "fwsvd", "asvd", "svd-llm", "shift-aware", "aa-svd")
    rows: list[dict[str, Any]] = []
    for keep in (0.8, 0.6):
        rows += [{**SAME, "keep": keep, "method": name} for name in names]
        rows += [{**UNIFORM, "keep": keep, "allocation": "threshold"}, {**ANCHORED, "keep": keep}]
    return rows


def everything(ridge: float | None) -> list[dict[str, Any]]:
    """All of them, in order of worth; a process on a CPU begins at the end."""
    rows: list[dict[str, Any]] = []
    for suite in (headline, best, generated, guard, steady, losses, search, parts, peers):
        rows += [row for row in suite(ridge) if plainly(row) not in map(plainly, rows)]
    return rows


SUITES = {
    f.__name__: f
    for f in (headline, best, generated, guard, search, parts, losses, steady, peers, everything)
}

if __name__ == "__main__":
    _rows.main(SUITES, __doc__)
