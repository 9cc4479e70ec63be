"""Pages to look at: one self-contained HTML file of a compression, or of a frontier of sizes."""

from slimrank.pages.frontier import (
    FrontierReport,
    FrontierRun,
    TaskAccuracy,
    TextPerplexity,
    front,
)
from slimrank.pages.page import read_shown, render, require_free, write_page

__all__ = [
    "FrontierReport",
    "FrontierRun",
    "TaskAccuracy",
    "TextPerplexity",
    "front",
    "read_shown",
    "render",
    "require_free",
    "write_page",
]
