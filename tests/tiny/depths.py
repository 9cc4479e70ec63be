"""Reports of sequential runs written down by hand: errors by block, and nothing was run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimrank.recipe import CompressionRecipe
from slimrank.report import BlockError, BlockReport, CompressionReport, SizeReport

SIZE = SizeReport(
    target_params_before=1000,
    target_params=800,
    model_params_before=2000,
    model_params=1800,
    weight_bytes_before=8000,
    weight_bytes=7200,
    int8_bytes=5000,
)


def error(value: float) -> BlockError:
    """Make an error whose cosine distance is a quarter of it."""
    return BlockError(relative_error=value, cosine_distance=value / 4)


def build(
    calibration: Sequence[float],
    held_out: Sequence[float] | None = None,
    unrefined: Sequence[float] | None = None,
    method: str = "svd-llm",
    keep: float = 0.8,
    **changes: Any,
) -> CompressionReport:
    """Make a report from relative errors by block; `unrefined` ones are of either text."""
    recipe: dict[str, Any] = {"method": method, "budget": {"param_ratio": keep}}
    if calibration:
        recipe["order"] = "sequential"
    if unrefined is not None:
        recipe["refine"] = "fast"
    blocks = tuple(
        BlockReport(
            index=index,
            name=f"model.layers.{index}",
            calibration=error(value),
            held_out=None if held_out is None else error(held_out[index]),
            unrefined_calibration=None if unrefined is None else error(unrefined[index]),
            unrefined_held_out=None
            if unrefined is None or held_out is None
            else error(2 * unrefined[index]),
            seconds={},
            peak_bytes=0,
        )
        for index, value in enumerate(calibration)
    )
    report = CompressionReport(
        model="by hand",
        recipe=CompressionRecipe(**recipe),
        recipe_fingerprint="0" * 64,
        calibration_fingerprint="1" * 64,
        tokens=100,
        size=SIZE,
        linears=(),
        blocks=blocks,
        seconds={},
        peak_bytes=0,
        environment={},
        warnings=(),
    )
    return report.model_copy(update=changes)


def write(report: CompressionReport, folder: Path) -> Path:
    """Put a report on disk, without weights."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return folder
