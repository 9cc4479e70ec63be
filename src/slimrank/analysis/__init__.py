"""What the spectra of a profile say about a model, and how far the importance of blocks agrees."""

from slimrank.analysis.correlation import Coefficient, Correlation, correlate
from slimrank.analysis.report import (
    AnalysisReport,
    ImportanceCorrelations,
    KindAnalysis,
    LinearAnalysis,
    mean_by_block,
    ner_by_block,
)
from slimrank.analysis.spectra import analyze

__all__ = [
    "AnalysisReport",
    "Coefficient",
    "Correlation",
    "ImportanceCorrelations",
    "KindAnalysis",
    "LinearAnalysis",
    "analyze",
    "correlate",
    "mean_by_block",
    "ner_by_block",
]
