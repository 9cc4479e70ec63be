"""Ranks from budgets; nothing here is larger than a spectrum."""

from slimrank.allocation.budget import PIVOT_PARAMS, Budget, Layout, LinearShape, RankPlan
from slimrank.allocation.global_ import GlobalPlan, allocate_global
from slimrank.allocation.greedy import greedy
from slimrank.allocation.profile import LinearProfile
from slimrank.allocation.swift import swift
from slimrank.allocation.threshold import threshold
from slimrank.allocation.uniform import uniform

__all__ = [
    "PIVOT_PARAMS",
    "Budget",
    "GlobalPlan",
    "Layout",
    "LinearProfile",
    "LinearShape",
    "RankPlan",
    "allocate_global",
    "greedy",
    "swift",
    "threshold",
    "uniform",
]
