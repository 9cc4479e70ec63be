"""AA-SVD's table 5 on a real model: four objectives, with and without refinement.

    python benchmarks/objectives.py SUITE MODEL --calibration FILE --test FILE --other FILE --out F

A suite is a list of rows (see `_rows`). The other text of the committed figures is the reference
manual that Python carries with it: "\\n\\n".join(topics[name] for name in sorted(topics)) of
pydoc_data.topics in Python 3.11.
"""

from typing import Any

import _rows
from _rows import BASE, is_refined, plainly

REFINED = {"refine": {"preset": "paper", "epochs": 10}}


def table(ridge: float | None) -> list[dict[str, Any]]:
    """Four objectives at three sizes, unrefined and refined, with three seeds."""
    rows: list[dict[str, Any]] = []
    for keep, seeds in ((0.8, (0, 1, 2)), (0.6, (0, 1, 2)), (0.4, (0,))):
        for seed in seeds:
            same = {"keep": keep, "seed": seed, "order": "sequential"}
            anchored = {**same, "method": "aa-svd", "ridge": ridge}
            rows += [{**anchored, **REFINED}, anchored]
            rows += [{**same, "method": "swift-svd", **how} for how in (REFINED, {})]
            rows += [{**same, "method": "shift-aware"}]
            if seed == 0 and keep > 0.4:
                rows += [{**same, "method": "svd", **how} for how in (REFINED, {})]
    return rows


def ridge(_: float | None) -> list[dict[str, Any]]:
    """The anchored objective's ridge against the number of calibration tokens."""
    return [
        {"keep": keep, "method": "aa-svd", "sequences": count, "ridge": size}
        for keep, count in ((0.8, 16), (0.8, 64), (0.6, 64), (0.8, 256))
        for size in (0.1, 0.3, 0.03, 0.01, 0.0)
    ]


def anchor(ridge: float | None) -> list[dict[str, Any]]:
    """Many tokens and the paper's 25 epochs."""
    many = {"sequences": 64, "length": 1024, "order": "sequential"}
    return [
        {**many, "method": method, "ridge": size, **how}
        for how in ({"refine": "paper"}, {})
        for method, size in (("swift-svd", None), ("aa-svd", ridge))
    ]


def epochs(ridge: float | None) -> list[dict[str, Any]]:
    """`fast` by epochs, by calibration tokens and by what trains, for objective 2 and for 4."""
    rows: list[dict[str, Any]] = []
    for count, number in ((32, 1), (32, 2), (32, 4), (32, 16), (64, 4), (128, 2), (128, 8)):
        how = {"preset": "fast", "epochs": number}
        rows.append({"method": "swift-svd", "sequences": count, "refine": how})
    for trains in (["factors"], ["norms"]):
        how = {"preset": "fast", "trains": trains}
        rows.append({"method": "swift-svd", "refine": how})
    anchored = {"method": "aa-svd", "ridge": ridge, "refine": "fast"}
    rows += [anchored, {**anchored, "keep": 0.6}]
    return [*rows, {"method": "swift-svd", "refine": "fast", "keep": 0.6}]


def fast(_: float | None) -> list[dict[str, Any]]:
    """What `fast` is to be, and what an epoch is worth, by text that nobody trains on."""
    rows: list[dict[str, Any]] = []
    for rate, batch, epochs, count in (
        (3e-4, 8, 8, 32),
        (1e-3, 8, 8, 32),
        (1e-4, 8, 8, 32),
        (3e-4, 8, 2, 128),
        (3e-4, 4, 8, 32),
        (3e-4, 8, 16, 32),
        (1e-3, 4, 2, 128),
    ):
        how = {"preset": "fast", "learning_rate": rate, "batch_sequences": batch, "epochs": epochs}
        rows.append({"method": "swift-svd", "sequences": count, "refine": how})
    rows += [
        {"method": "swift-svd", "refine": {"preset": "paper", "epochs": epochs}}
        for epochs in (1, 3, 25)
    ]
    return rows


def ranks(ridge: float | None) -> list[dict[str, Any]]:
    """Recipes A and B of dynamic ranks, and both, against uniform ones."""
    return [
        {
            "method": method,
            "ridge": size,
            "allocation": allocation,
            "within_block": within,
            "order": "sequential",
            **how,
        }
        for how in ({}, {"refine": "fast"})
        for method, size in (("aa-svd", ridge), ("swift-svd", None))
        for allocation in ("uniform", "swift")
        for within in ("greedy", "fixed")
    ]


def evidence(ridge: float | None) -> list[dict[str, Any]]:
    """Everything but the sweeps that settings were chosen by; refined rows first."""
    rows: list[dict[str, Any]] = []
    for row in (row for suite in (table, epochs, ranks, anchor) for row in suite(ridge)):
        if plainly({**BASE, **row}) not in [plainly({**BASE, **known}) for known in rows]:
            rows.append(row)
    return sorted(rows, key=lambda row: not is_refined(row))


SUITES = {f.__name__: f for f in (table, ridge, anchor, epochs, fast, ranks, evidence)}

if __name__ == "__main__":
    _rows.main(SUITES, __doc__)
