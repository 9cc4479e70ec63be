"""Error against depth of sequential runs: gathered from their reports, and drawn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slimrank.checkpoint import read_report, renamed_when_done
from slimrank.errors import CheckpointError
from slimrank.plots import block_ticks, make_panels
from slimrank.report import BlockError, BlockReport, CompressionReport

HELD_OUT, CALIBRATION, UNREFINED = "held-out text", "calibration text", "before refinement"
STYLES: dict[str, dict[str, Any]] = {
    HELD_OUT: {"linestyle": "-", "linewidth": 1.6, "markersize": 3},
    CALIBRATION: {"linestyle": ":", "linewidth": 0.9, "markersize": 2},
    UNREFINED: {"linestyle": "--", "linewidth": 1.1, "markersize": 2},
}
COLOURS = 10  # of matplotlib's own cycle; the next ten runs have another marker
MARKERS = "os^D"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DepthRun(_Frozen):
    """The blocks of one compressed folder.

    Parameters
    ----------
    folder : str
    label : str
        Method, what was kept, and whether blocks were refined; the folder where runs share that.
    model : str
        Where the dense model came from.
    method : str
    param_ratio : float
        Share of the parameters that was to stay.
    scope : str
        What it is a share of: 'targets' or 'model'.
    refined : bool
    calibration_fingerprint : str
    blocks : tuple of BlockReport
    """

    folder: str
    label: str
    model: str
    method: str
    param_ratio: float
    scope: str
    refined: bool
    calibration_fingerprint: str
    blocks: tuple[BlockReport, ...]

    def curves(self) -> dict[str, dict[int, BlockError]]:
        """Errors by block, for each text that was measured on; the first is the one to compare.

        Before refinement it is the error on held-out text too, or on the calibration text if none
        was held out.
        """
        errors: dict[str, dict[int, BlockError | None]] = {
            HELD_OUT: {x.index: x.held_out for x in self.blocks},
            CALIBRATION: {x.index: x.calibration for x in self.blocks},
            UNREFINED: {
                x.index: x.unrefined_held_out or x.unrefined_calibration for x in self.blocks
            },
        }
        measured = {
            text: {block: error for block, error in curve.items() if error is not None}
            for text, curve in errors.items()
        }
        return {text: curve for text, curve in measured.items() if curve}


class DepthReport(_Frozen):
    """Several runs, side by side, in the order they were named."""

    runs: tuple[DepthRun, ...]


def read_depths(folders: Sequence[Path]) -> DepthReport:
    """Gather the blocks of compressed folders.

    Raises
    ------
    CheckpointError
        If a folder holds no report, a damaged one, or one of a one-shot run.
    """
    reports = [read_report(folder) for folder in folders]
    for folder, report in zip(folders, reports, strict=True):
        if not report.blocks:
            raise CheckpointError(
                f"{folder} was made in one-shot order and holds no errors by depth; "
                "compress with --order sequential"
            )
    labels = _distinct([_label(report) for report in reports], folders)
    runs = [
        DepthRun(
            folder=str(folder),
            label=label,
            model=report.model,
            method=report.recipe.method,
            param_ratio=report.recipe.budget.param_ratio,
            scope=report.recipe.budget.scope,
            refined=report.recipe.refines,
            calibration_fingerprint=report.calibration_fingerprint,
            blocks=report.blocks,
        )
        for folder, label, report in zip(folders, labels, reports, strict=True)
    ]
    return DepthReport(runs=tuple(runs))


def write_depth_plot(report: DepthReport, out: Path) -> None:
    """Write the picture of `draw_depth` as PNG.

    Parameters
    ----------
    report : DepthReport
    out : Path
        Ends in ``.png`` and must not exist.

    Raises
    ------
    CheckpointError
        If `out` is no such name, or the disk is full or refuses. Nothing remains then.
    SlimrankError
        If matplotlib is not installed.
    """
    if out.suffix.lower() != ".png":
        raise CheckpointError(f"{out} is to be a PNG picture; name a file that ends in .png")
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; name a file that does not")
    figure = draw_depth(report)
    with renamed_when_done(out, is_file=True) as picture:
        figure.savefig(picture, dpi=120)


def draw_depth(report: DepthReport) -> Any:
    """Relative error and cosine distance by block: a colour a run, a line style a text.

    An error of zero has no place on a logarithmic axis and leaves a gap.
    """
    rows = math.ceil(len(report.runs) / 2)
    figure, (error, cosine) = make_panels(2, (11.0, 4.6 + 0.22 * rows))
    from matplotlib.lines import Line2D

    runs, styles = [], {}
    for number, run in enumerate(report.runs):
        look: dict[str, Any] = {
            "color": f"C{number % COLOURS}",
            "marker": MARKERS[number // COLOURS % 4],
        }
        runs.append(Line2D([], [], label=run.label.replace("$", r"\$"), **look))
        for text, curve in run.curves().items():
            relative = [
                x.relative_error if x.relative_error > 0 else math.nan for x in curve.values()
            ]
            error.plot(list(curve), relative, **look, **STYLES[text])
            distances = [x.cosine_distance for x in curve.values()]
            cosine.plot(list(curve), distances, **look, **STYLES[text])
            styles[text] = Line2D([], [], color="black", label=text, **STYLES[text])
    error.set_yscale("log")
    error.set(xlabel="block", ylabel="relative error", title="E ‖y − y'‖² / E ‖y‖²")
    cosine.set(xlabel="block", ylabel="cosine distance", title="mean of 1 − cos(y, y')")
    last = max(block.index for run in report.runs for block in run.blocks)
    for axes in (error, cosine):
        axes.set_xticks(block_ticks(last + 1))
        axes.grid(visible=True, alpha=0.3)
    cosine.legend(handles=[styles[text] for text in STYLES if text in styles], fontsize="small")
    figure.legend(handles=runs, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle("Error of the blocks' outputs against depth")
    return figure


def _label(report: CompressionReport) -> str:
    recipe = report.recipe
    of_model = " of the model" if recipe.budget.scope == "model" else ""
    kept = f"{recipe.method}, keep {recipe.budget.param_ratio:g}{of_model}"
    return f"{kept}, refined" if recipe.refines else kept


def _distinct(labels: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Add the folder's name to labels that occur twice, or all of its path if that does not do.

    Examples
    --------
    >>> _distinct(["svd", "svd", "svd", "aa-svd"], [Path(x) for x in ("a", "1/b", "2/b", "c")])
    ['svd (a)', 'svd (1/b)', 'svd (2/b)', 'aa-svd']
    """
    named = [
        f"{label} ({folder.resolve().name})" if labels.count(label) > 1 else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    return [
        f"{label} ({folder})" if named.count(name) > 1 else name
        for label, name, folder in zip(labels, named, folders, strict=True)
    ]
