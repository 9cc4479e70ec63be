"""Ranks from budgets; nothing here is larger than a spectrum."""

from slimrank.allocation.budget import Budget, LinearShape, RankPlan
from slimrank.allocation.greedy import greedy
from slimrank.allocation.profile import LinearProfile
from slimrank.allocation.swift import swift
from slimrank.allocation.uniform import uniform

__all__ = ["Budget", "LinearProfile", "LinearShape", "RankPlan", "greedy", "swift", "uniform"]
