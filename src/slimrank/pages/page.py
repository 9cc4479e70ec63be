"""From a folder to one HTML file that needs nothing else."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from slimrank.checkpoint import read_report
from slimrank.errors import CheckpointError
from slimrank.pages.compression import compression_page
from slimrank.pages.content import Page
from slimrank.pages.frontier import FrontierReport
from slimrank.pages.frontier_page import frontier_page
from slimrank.report import CompressionReport

REPORT, FRONTIER = "report.json", "frontier.json"


def read_shown(folder: Path) -> CompressionReport | FrontierReport:
    """Read what there is to show of a folder: a frontier, or else the report of a compression.

    Raises
    ------
    CheckpointError
        If it holds neither, or a damaged one.
    """
    path = folder / FRONTIER
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        return FrontierReport.from_json(text, str(path))
    if not (folder / REPORT).is_file():
        raise CheckpointError(
            f"{folder} holds no {REPORT} and no {FRONTIER}; name a folder that slimrank compress "
            "or a benchmark wrote"
        )
    return read_report(folder)


def render(report: CompressionReport | FrontierReport) -> str:
    """Write a page: one HTML file with its style and its drawings in it, and no script.

    All text of the report is escaped; what is in it cannot become part of the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("slimrank.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(page=_lay_out(report))


def _lay_out(report: CompressionReport | FrontierReport) -> Page:
    if isinstance(report, FrontierReport):
        return frontier_page(report)
    return compression_page(report)


def write_page(html: str, out: Path, force: bool = False) -> None:
    """Write a page whole or not at all.

    Parameters
    ----------
    html : str
    out : Path
    force : bool
        Take the place of a file that is there.

    Raises
    ------
    CheckpointError
        If `out` is there and not to be replaced, is a folder, or the disk refuses.
    """
    require_free(out, force)
    passing = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.partial-", dir=out.parent)
        passing = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        passing.chmod(0o644)
        require_free(out, force)
        passing.replace(out)
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"cannot write {out}: {error}; nothing was kept") from error
    finally:
        if passing is not None:
            with suppress(OSError):
                passing.unlink(missing_ok=True)


def require_free(out: Path, force: bool) -> None:
    """See that a page can take its name.

    Raises
    ------
    CheckpointError
        If something has it.
    """
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder; name a file for the page")
    if (out.exists() or out.is_symlink()) and not force:
        raise CheckpointError(f"{out} exists already; name another file, or say --force")
