"""Ranks from budgets; nothing here is larger than a list of shapes."""

from slimrank.allocation.budget import Budget, LinearShape, RankPlan
from slimrank.allocation.uniform import uniform

__all__ = ["Budget", "LinearShape", "RankPlan", "uniform"]
