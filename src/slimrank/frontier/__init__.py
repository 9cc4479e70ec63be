"""Methods, allocations, layouts and sizes on one model, under one accounting."""

from slimrank.frontier.bench import BenchRecipe
from slimrank.frontier.cells import Cell, cells
from slimrank.frontier.plot import draw_frontier, frontier_svg, write_plot
from slimrank.frontier.result import FrontierReport, FrontierRun, TaskFigure, TextFigure
from slimrank.frontier.run import measure_frontier

__all__ = [
    "BenchRecipe",
    "Cell",
    "FrontierReport",
    "FrontierRun",
    "TaskFigure",
    "TextFigure",
    "cells",
    "draw_frontier",
    "frontier_svg",
    "measure_frontier",
    "write_plot",
]
