"""Speed and memory of models that serve, side by side."""

from slimrank.benchmarking.report import BenchmarkReport, CaseFigures, ModelFigures
from slimrank.benchmarking.run import benchmark

__all__ = ["BenchmarkReport", "CaseFigures", "ModelFigures", "benchmark"]
