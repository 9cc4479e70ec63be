"""Four pictures of a profile. matplotlib is loaded here only, and without its global state."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.analysis import (
    AnalysisReport,
    Correlation,
    LinearAnalysis,
    mean_by_block,
    ner_by_block,
)
from slimrank.errors import extra_needed
from slimrank.linalg import tail_energy

COLUMNS = 4
NOISE = 1e-8  # of the largest singular value: roots of what float64 leaves of a moment
COLOURS = "viridis"


def write_plots(report: AnalysisReport, spectra: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write the four pictures as PNG.

    Parameters
    ----------
    report : AnalysisReport
    spectra : mapping of str to Tensor of shape (k,)
        Singular values of each linear's outputs, in descending order.
    folder : Path
        Exists.

    Returns
    -------
    list of str
        Names of the files.

    Raises
    ------
    SlimrankError
        If matplotlib is not installed.
    """
    pictures = {
        "heat_map.png": draw_heat_map(report),
        "spectra.png": draw_spectra(report, spectra),
        "energy_rank.png": draw_energy(report, spectra),
        "importance.png": draw_importance(report),
    }
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=120)
    return list(pictures)


def draw_heat_map(report: AnalysisReport) -> Any:
    """Normalised effective rank, blocks across and module types down; grey where there is none."""
    kinds = [kind.kind for kind in report.kinds]
    blocks = len(report.importance)
    values = torch.full((len(kinds), blocks), math.nan, dtype=torch.float64)
    for row, kind in enumerate(kinds):
        for block, value in ner_by_block(report.linears, kind).items():
            values[row, block] = value
    figure, (axes,) = make_panels(1, (5.2 + 0.28 * blocks, 2.2 + 0.4 * len(kinds)))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values.numpy(), aspect="auto", cmap=COLOURS, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(block_ticks(blocks))
    axes.set(xlabel="block", ylabel="module type", title="Normalised effective rank of the outputs")
    figure.colorbar(image, ax=axes, label="effective rank / min(in, out)")
    return figure


def draw_spectra(report: AnalysisReport, spectra: Mapping[str, Tensor]) -> Any:
    """Singular values over the largest, one panel a module type and one curve a block."""
    kinds = [kind.kind for kind in report.kinds]
    figure, panels = make_panels(len(kinds))
    colour = _depth(len(report.importance))
    for axes, kind in zip(panels, kinds, strict=True):
        curves = _curves_by_block(
            report.linears, kind, lambda name: spectra[name] / spectra[name][0]
        )
        for block, curve in curves.items():
            visible = curve.where(curve > NOISE, math.nan)
            share = torch.arange(1, len(curve) + 1) / len(curve)
            axes.plot(share, visible, color=colour.to_rgba(block), linewidth=0.9)
        axes.set_yscale("log")
        axes.set_title(kind, fontsize="small")
    figure.suptitle("Spectra of the outputs, mean over the linears of a block")
    figure.supxlabel("index / min(in, out)")
    figure.supylabel("singular value / largest")
    figure.colorbar(colour, ax=panels, label="block", ticks=block_ticks(len(report.importance)))
    return figure


def draw_energy(report: AnalysisReport, spectra: Mapping[str, Tensor]) -> Any:
    """Share of the energy that a share of the full rank keeps: median and range over blocks."""
    kinds = [kind.kind for kind in report.kinds]
    figure, panels = make_panels(len(kinds))

    def kept(name: str) -> Tensor:
        tail = tail_energy(spectra[name])
        return 1 - tail[1:] / tail[0]

    for axes, kind in zip(panels, kinds, strict=True):
        curves = _same_length(list(_curves_by_block(report.linears, kind, kept).values()))
        share = torch.arange(1, curves.shape[1] + 1) / curves.shape[1]
        low, high = curves.min(dim=0).values, curves.max(dim=0).values
        axes.fill_between(share, low, high, alpha=0.3, linewidth=0, label="range over blocks")
        axes.plot(share, curves.quantile(0.5, dim=0), label="median")
        for level in (0.9, 0.99):
            axes.axhline(level, color="grey", linewidth=0.6, linestyle=":")
        axes.set(xscale="log", ylim=(0, 1.02))
        axes.set_title(kind, fontsize="small")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle("Energy kept by the leading singular values (dotted: 90 % and 99 %)")
    figure.supxlabel("rank / min(in, out)")
    figure.supylabel("share of the energy")
    return figure


def draw_importance(report: AnalysisReport) -> Any:
    """Importance by block, then against effective rank: the mean over types, and each type."""
    figure, (by_block, *panels) = make_panels(2 + len(report.kinds))
    last = len(report.importance) - 1
    by_block.plot(report.importance, marker="o", markersize=3, label="before the final norm")
    if report.importance_after_norm is not None:
        after = report.importance_after_norm
        by_block.plot(last, after, "o", fillstyle="none", label="last block, after the norm")
    by_block.legend(fontsize="small")
    by_block.set_xticks(block_ticks(last + 1))
    by_block.set(xlabel="block", ylabel="importance")
    by_block.set_title("block influence", fontsize="small")
    colour = _depth(len(report.importance))
    scatters = [("mean over module types", mean_by_block(report.linears), report.overall)]
    scatters += [
        (k.kind, ner_by_block(report.linears, k.kind), k.correlations) for k in report.kinds
    ]
    for axes, (what, ner, found) in zip(panels, scatters, strict=True):
        importance = [report.importance[block] for block in ner]
        axes.scatter(importance, list(ner.values()), s=14, c=colour.to_rgba(list(ner)))
        axes.set_title(f"{what}\n{_in_words(found.all_blocks)}", fontsize="small")
        axes.set(xlabel="importance of the block", ylabel="normalised effective rank")
    figure.suptitle("Importance of blocks against normalised effective rank")
    figure.colorbar(colour, ax=panels, label="block", ticks=block_ticks(len(report.importance)))
    return figure


def make_panels(count: int, size: tuple[float, float] | None = None) -> tuple[Any, list[Any]]:
    """Make a figure with as many axes, of a given size in inches or one that suits them.

    Raises
    ------
    SlimrankError
        If matplotlib is not installed.
    """
    with extra_needed("plots need matplotlib", "analysis"):
        from matplotlib.figure import Figure
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=size or (2 + 3.2 * columns, 1 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _depth(blocks: int) -> Any:
    """Give each block its colour."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, max(blocks - 1, 1)), colormaps[COLOURS])


def block_ticks(blocks: int) -> list[int]:
    """Blocks to mark on an axis: the first, and at most seven more in even steps."""
    return list(range(0, blocks, -(-blocks // 8)))


def _curves_by_block(
    linears: Sequence[LinearAnalysis], kind: str, curve: Callable[[str], Tensor]
) -> dict[int, Tensor]:
    """Mean curve of a module type in each block, over the linears that gave an output."""
    found: dict[int, list[Tensor]] = {}
    for linear in linears:
        if linear.kind == kind and linear.effective_rank > 0:
            found.setdefault(linear.block, []).append(curve(linear.name))
    return {block: _same_length(found[block]).mean(dim=0) for block in sorted(found)}


def _same_length(curves: Sequence[Tensor]) -> Tensor:
    """Stack curves over the same range, the shorter ones interpolated to the longest."""
    longest = max(map(len, curves))
    return torch.stack(
        [
            curve
            if len(curve) == longest
            else torch.nn.functional.interpolate(
                curve[None, None], size=longest, mode="linear", align_corners=True
            )[0, 0]
            for curve in curves
        ]
    )


def _in_words(found: Correlation) -> str:
    if found.pearson is None:
        return f"no r: {found.reason}"
    return f"r = {found.pearson.value:+.2f}, p = {found.pearson.p_value:.2g}"
