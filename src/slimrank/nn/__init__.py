"""Modules that run."""

from slimrank.nn.low_rank_linear import LowRankLinear

__all__ = ["LowRankLinear"]
