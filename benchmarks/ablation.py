"""What each ingredient is worth: layout, metric of the solve, allocation and its unit, refinement.

    python benchmarks/ablation.py SUITE MODEL --calibration FILE --test FILE --other FILE --out F

A suite is a list of rows (see `_rows`); texts are those of `objectives.py`.
"""

from typing import Any

import _rows
import objectives
from _rows import is_refined

SAME = {"sequences": 48}
BEST = {**SAME, "method": "kfac-svd", "allocation": "global", "layout": "auto"}
PUBLISHED = {**SAME, "method": "swift-svd", "refine": {"preset": "paper", "epochs": 10}}


def unit(name: str) -> dict[str, Any]:
    return {"allocation": "global", "global_ranks": {"unit": name}}


def search(_: float | None) -> list[dict[str, Any]]:
    """Damping, ridge and labels; chosen by text that no run has seen."""
    rows: list[dict[str, Any]] = [{**BEST, "damping": size} for size in (1e-3, 1e-2, 1e-1, 1e-4)]
    rows += [{**BEST, "ridge": size} for size in (0.01, 0.1)]
    rows += [{**BEST, "gradients": {"labels": "model"}}, {**BEST, "damping": 1e-2, "ridge": 0.01}]
    rows += [{**BEST, "keep": 0.6, "damping": size} for size in (1e-3, 1e-2, 1e-1)]
    rows += [{**BEST, "keep": 0.6, "ridge": size} for size in (0.01,)]
    return rows


def parts(_: float | None) -> list[dict[str, Any]]:
    """Each ingredient alone, and each left out, without refinement."""
    rows: list[dict[str, Any]] = []
    for keep in (0.8, 0.6):
        for method in ("swift-svd", "kfac-svd"):
            for layout in ("plain", "auto"):
                same = {**SAME, "keep": keep, "method": method, "layout": layout}
                rows += [same, {**same, **unit("kfac")}]
        plain = {**SAME, "keep": keep, "method": "swift-svd"}
        rows += [{**plain, **unit("relative")}, {**plain, **unit("gradient")}]
        rows += [{**BEST, "keep": keep, "global_ranks": {"may_stay_dense": False}}]
        rows += [{**BEST, "keep": keep, "order": "sequential"}]
    rows += [{**BEST, "keep": 0.4}, {**SAME, "method": "swift-svd", "keep": 0.4}]
    return rows


def refined(_: float | None) -> list[dict[str, Any]]:
    """Losses of a refinement, from the best start, and the published recipe."""
    rows: list[dict[str, Any]] = []
    for keep in (0.8, 0.6, 0.4):
        rows += [{**PUBLISHED, "keep": keep}]
        rows += [{**BEST, "keep": keep, "refine": {"preset": "fast", "loss": "gradient"}}]
        rows += [{**BEST, "keep": keep, "refine": "fast"}]
    rows += [{**BEST, "refine": {"preset": "fast", "loss": "kl", "epochs": 2}}]
    return rows


def steady(_: float | None) -> list[dict[str, Any]]:
    """Seeds and tokens."""
    rows: list[dict[str, Any]] = []
    for keep in (0.8, 0.6):
        for method in ({"method": "swift-svd"}, BEST):
            rows += [{**method, **SAME, "keep": keep, "seed": seed} for seed in (1, 2)]
            rows += [{**method, "keep": keep, "sequences": 192}]
    return rows


ANCHORED = {**BEST, "method": "kfac-aa-svd"}


def second(_: float | None) -> list[dict[str, Any]]:
    """What the first suites left open, in order of worth."""
    gradient, best = {"preset": "fast", "loss": "gradient"}, {**BEST, "damping": 1e-2}
    anchored = {**ANCHORED, "damping": 1e-2}
    rows: list[dict[str, Any]] = [
        {**best, "keep": 0.6, "refine": gradient},
        {**best, "refine": gradient},
        {**anchored, "keep": 0.6},
        {**best, "keep": 0.6, "refine": "fast"},
        {**PUBLISHED, "keep": 0.6},
        {**PUBLISHED},
        {**anchored},
        {**anchored, "keep": 0.6, "refine": gradient},
        {**best, "refine": "fast"},
        {**best, "keep": 0.4, "refine": gradient},
        {**PUBLISHED, "keep": 0.4},
        {**best, "keep": 0.4},
    ]
    old = [row for row in objectives.ranks(0.1) if is_refined(row) and row["allocation"] != ""]
    rows += [row for row in old if {row["allocation"], row["within_block"]} != {"uniform", "fixed"}]
    rows += [{**best, "keep": keep, "seed": seed} for keep in (0.8, 0.6) for seed in (1, 2)]
    rows += [row for row in objectives.anchor(0.1) if is_refined(row)]
    rows += [row for row in parts(None) if row["keep"] == 0.6]
    plain = {**SAME, "method": "swift-svd"}
    rows += [{**plain, "keep": keep, "seed": seed} for keep in (0.8, 0.6) for seed in (1, 2)]
    light = [row for row in objectives.ranks(0.1) if not is_refined(row)]
    return [*rows, {**plain, "keep": 0.4}, *light]


def everything(ridge: float | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in (row for suite in (search, parts, refined, steady) for row in suite(ridge)):
        if row not in rows:
            rows.append(row)
    return rows


SUITES = {f.__name__: f for f in (search, parts, refined, steady, second, everything)}

if __name__ == "__main__":
    _rows.main(SUITES, __doc__)
