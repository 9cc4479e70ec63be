"""From a cell and what was measured of it to its row."""

from collections.abc import Mapping
from typing import Any

from slimrank.calibration import TokenWindows
from slimrank.frontier.bench import BenchRecipe
from slimrank.frontier.cells import Cell
from slimrank.frontier.result import FrontierRun, TaskFigure, TextFigure
from slimrank.frontier.store import Measured


def row(cell: Cell, measured: Measured, bench: BenchRecipe) -> FrontierRun:
    """Row of a cell that is finished."""
    return FrontierRun(
        **_settings(cell),
        bytes=measured.bytes,
        linear_bytes=measured.linear_bytes,
        params=measured.params,
        target_params=measured.target_params,
        perplexity={
            name: TextFigure(
                value=found.value, tokens=found.tokens, in_domain=bench.texts[name].in_domain
            )
            for name, found in measured.perplexity.items()
        },
        accuracy={
            name: TaskFigure(value=found.accuracy, stderr=found.stderr, n=found.num_questions)
            for name, found in measured.accuracy.items()
        },
        seconds=measured.seconds,
        peak_bytes=measured.peak_bytes,
    )


def failed_row(cell: Cell, error: str) -> FrontierRun:
    """Row of a cell that failed: its settings, no figures."""
    return FrontierRun(**_settings(cell), error=error)


def settings(bench: BenchRecipe, texts: Mapping[str, TokenWindows]) -> dict[str, Any]:
    """What all rows have in common, for the report: the benchmark, and what its texts came to."""
    found = bench.model_dump(mode="json", exclude={"model"})
    for name, windows in texts.items():
        found["texts"][name] |= {"tokens": windows.tokens, "fingerprint": windows.fingerprint()}
    sources = (bench.base.get("calibration") or {}).get("source") or "packaged sample"
    labels = {"accuracy": "acc, zero-shot, not normalised by length", "calibration": sources}
    return found | {"labels": labels}


def _settings(cell: Cell) -> dict[str, Any]:
    """What a row says of how its model is made."""
    if cell.kind != "low-rank":
        return {
            "name": cell.name,
            "recipe": {},
            "keep": 1.0,
            "layout": "dense",
            "method": cell.kind,
            "allocation": "none",
            "refine": "off",
            "is_dense": True,
        }
    values = cell.recipe.model_dump(mode="json") if cell.recipe else cell.values
    refine = values.get("refine", "off")
    preset = refine.get("preset", "off") if isinstance(refine, dict) else refine
    return {
        "name": cell.name,
        "recipe": values,
        "keep": float((values.get("budget") or {}).get("param_ratio", 0)),
        "layout": str(values.get("layout", "plain")),
        "method": str(values.get("method", "")),
        "allocation": str(values.get("allocation", "")),
        "refine": str(preset),
        "int8_factors": cell.int8_factors,
    }
