"""``slimrank analyze``."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from slimrank.analysis import AnalysisReport, Correlation, ImportanceCorrelations, analyze
from slimrank.checkpoint import read_profile, renamed_when_done, require_writable
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_table
from slimrank.errors import NumericalWarning
from slimrank.plots import write_plots


@friendly
def analyze_command(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A folder that slimrank profile wrote.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the results; must not exist.")
    ],
    json: opt.Json = False,
) -> None:
    """Say where the effective rank of PROFILE is low, and whether important blocks have less.

    Writes analysis.json, linears.csv and four plots. Needs slimrank[analysis].
    """
    require_writable(out)
    content = read_profile(profile)
    report = analyze(content)
    text = report.model_dump_json(indent=1)
    with renamed_when_done(out) as folder:
        (folder / "analysis.json").write_text(text, encoding="utf-8")
        (folder / "linears.csv").write_text(report.csv(), encoding="utf-8")
        plots = write_plots(report, content.spectra, folder)
    for message in report.warnings:
        warnings.warn(message, NumericalWarning, stacklevel=1)
    if json:
        print_json(text)
        return
    _print_kinds(report)
    _print_overall(report.overall)
    typer.echo(f"wrote analysis.json, linears.csv, {', '.join(plots)} to {out}")


def _print_kinds(report: AnalysisReport) -> None:
    rows = [
        (
            kind.kind,
            kind.num_linears,
            f"{kind.mean_effective_rank:.1f}",
            f"{kind.mean_normalized_effective_rank:.3f}",
            f"{kind.mean_energy_ranks[0.99]:.1f}",
            *_figures(kind.correlations.all_blocks)[:3],
        )
        for kind in report.kinds
    ]
    columns = ("linear", "count", "eff. rank", "normalised", "rank for 99 %", "r", "sign", "p")
    print_table(f"effective rank in {report.profile}, means; r with importance", columns, rows)


def _print_overall(found: ImportanceCorrelations) -> None:
    variants = {
        "all blocks": found.all_blocks,
        "all, the last after the final norm": found.all_blocks_after_norm,
        "without the first two and the last": found.inner_blocks,
    }
    rows = [(what, x.num_blocks, *_figures(x)) for what, x in variants.items() if x is not None]
    columns = ("blocks", "count", "r", "sign", "p", "Spearman", "sign", "p")
    print_table(
        "importance against normalised effective rank, mean over module types", columns, rows
    )
    for what, x in variants.items():
        if x is not None and x.reason is not None:
            typer.echo(f"{what}: no correlation ({x.reason})")


def _figures(found: Correlation) -> list[str]:
    """Value, sign and p-value of both coefficients; a dash where there is none."""
    texts = []
    for coefficient in (found.pearson, found.spearman):
        if coefficient is None:
            texts += ["-", "-", "-"]
        else:
            value, p_value = coefficient.value, coefficient.p_value
            texts += [f"{value:+.2f}", coefficient.sign, f"{p_value:.2g}"]
    return texts
