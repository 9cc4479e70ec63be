"""Spend parameters where they gain most: the one rule behind `greedy` and `allocate_global`."""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from slimrank.allocation.budget import Layout, LinearShape
from slimrank.allocation.hull import lower_hull

HALVINGS = 48
Path = Iterator[tuple[float, int, int, int]]
"""Edges as worth a parameter, negative; where it starts and stops; cost."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Steps of one linear, each from a size that is allowed to the next larger one.

    Parameters
    ----------
    costs : array of shape (steps,), int64
        Parameters of each step, at least 1.
    gains : array of shape (steps,), float64
        By how much each lowers the loss, at least 0.
    """

    costs: Int64[ndarray, " steps"]
    gains: Float64[ndarray, " steps"]

    def edges(self, start: int, params: int | None = None) -> "Edges":
        """Edges of the lower hull of the sizes from one on that cost at most so much more."""
        costs, gains = self.costs[start:], self.gains[start:]
        if params is not None:
            within = int(np.searchsorted(costs.cumsum(), params, side="right"))
            costs, gains = costs[:within], gains[:within]
        worths = gains / costs
        if not np.any(worths[1:] > worths[:-1]):
            return Edges(start + np.arange(len(costs) + 1), costs, worths)
        spent = np.append(0, costs.cumsum())
        losses = np.append(gains[::-1].cumsum()[::-1], 0.0)
        kept = lower_hull(spent, losses)
        costs = np.diff(spent[kept])
        worths = np.minimum.accumulate(-np.diff(losses[kept]) / costs)  # sorted despite rounding
        return Edges(start + kept, costs, worths)

    def path(self, start: int, params: int) -> Path:
        """Walk along those edges."""
        if start == len(self.costs) or int(self.costs[start]) > params:
            return iter(())
        return self.edges(start, params).path()


@dataclass(frozen=True, slots=True)
class Edges:
    """Edges of a hull: between which sizes, at what cost, and worth what a parameter, falling."""

    vertices: Int64[ndarray, " edges_plus_1"]
    costs: Int64[ndarray, " edges"]
    worths: Float64[ndarray, " edges"]

    def path(self, first: int = 0, end: int | None = None) -> Path:
        """Walk along some of the edges."""
        vertices = self.vertices[first : None if end is None else end + 1].tolist()
        worths, costs = (-self.worths[first:end]).tolist(), self.costs[first:end].tolist()
        return zip(worths, vertices, vertices[1:], costs, strict=False)


def fill(curves: Sequence[Curve], params: int) -> tuple[list[int], float]:
    r"""Take, again and again, the move that gains most a parameter of all that still fit.

    A move takes one linear from its size to any larger one. While whole edges of the lower hulls
    fit, these are the moves: the best set at its own cost, for none of the same cost loses less
    (the Lagrangian optimum, with the worth of the last edge as multiplier). The first edge that
    does not fit bounds what is short of the optimum from there on: by no more than it gains. Then
    the hulls of what does fit go on, sizes between the vertices of the first ones included. Equal
    worths go to the smaller size first, then by order of curves. A move that gains nothing is taken
    too.

    One parameter more never leaves a larger loss. Both fillings are the same up to the first move
    that is not; the one that has more takes there a move that the other has no room for, which is
    all that is left, at a worth that no move of the other passes from there on.

    Parameters
    ----------
    curves : sequence of Curve
    params : int
        What all moves together may cost.

    Returns
    -------
    list of int
        Number of steps taken of each.
    float
        Worth a parameter of the first edge that does not fit; 0 if all do.

    Examples
    --------
    The first curve has edges worth 9/2 and, its next two steps together, 5/2; the second 4 and 1.
    Of 5, 3 are spent on worths of 9/2 and 4, and the edge of 2 fits exactly.

    >>> first = Curve(np.array([2, 1, 1]), np.array([9.0, 1.0, 4.0]))
    >>> other = Curve(np.array([1, 1]), np.array([4.0, 1.0]))
    >>> fill([first, other], 5)
    ([3, 1], 1.0)
    >>> fill([first, other], 4)
    ([2, 1], 2.5)
    """
    if not curves:
        return [], 0.0
    edges = [curve.edges(0) for curve in curves]
    counts = _edges_that_fit(edges, params)
    ahead = [float(e.worths[n]) for e, n in zip(edges, counts, strict=True) if n < len(e.worths)]
    taken = [int(e.vertices[n]) for e, n in zip(edges, counts, strict=True)]
    left = params - sum(int(e.costs[:n].sum()) for e, n in zip(edges, counts, strict=True))
    paths = [e.path(n, n + 1) for e, n in zip(edges, counts, strict=True)]
    return _fill_rest(curves, taken, paths, left), max(ahead, default=0.0) + 0.0  # no -0.0


def _edges_that_fit(edges: Sequence[Edges], params: int) -> list[int]:
    """Count the edges of each hull above a worth at which all of them fit together.

    The worth is found by halving, to 12 digits or so: edges that come between it and the first that
    does not fit are left to be taken one by one.
    """
    worths = [-e.worths for e in edges]  # ascending
    spent = [np.append(0, e.costs.cumsum()) for e in edges]

    def above(worth: float) -> tuple[list[int], int]:
        counts = [int(w.searchsorted(-worth)) for w in worths]
        return counts, sum(int(s[n]) for s, n in zip(spent, counts, strict=True))

    counts, cost = above(0.0)
    if cost <= params:
        return counts
    positive = [-float(w[i]) for w, n in zip(worths, counts, strict=True) if n for i in (0, n - 1)]
    low, high = math.log2(min(positive)) - 1, math.log2(max(positive)) + 1
    counts = [0] * len(edges)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found, cost = above(2.0**middle)
        if cost <= params:
            counts, high = found, middle
        else:
            low = middle
    return counts


def _fill_rest(
    curves: Sequence[Curve], taken: Sequence[int], paths: Sequence[Path], left: int
) -> list[int]:
    """Move on, edge by edge; where a path ends or no longer fits, it is drawn anew."""
    taken, paths = list(taken), list(paths)
    queue: list[tuple[float, int, int, int, int]] = []

    def look_ahead(i: int) -> None:
        edge = next(paths[i], None)
        if edge is None or edge[-1] > left:
            paths[i] = curves[i].path(taken[i], left)
            edge = next(paths[i], None)
        if edge is not None:
            negative_worth, start, stop, cost = edge
            heapq.heappush(queue, (negative_worth, start, i, stop, cost))

    for i in range(len(curves)):
        look_ahead(i)
    while queue:
        _, _, i, stop, cost = heapq.heappop(queue)
        if cost <= left:
            taken[i] = stop
            left -= cost
        else:
            paths[i] = iter(())
        look_ahead(i)
    return taken


def rank_costs(shape: LinearShape, smallest: int, largest: int, step: int) -> Int64[ndarray, " n"]:
    """Parameters of every step of rank from the smallest up to the largest."""
    sides = (shape.out_features, shape.in_features, shape.layout)
    return _rank_costs(*sides, smallest, largest, step)


@lru_cache(maxsize=64)
def _rank_costs(
    out_features: int, in_features: int, layout: Layout, smallest: int, largest: int, step: int
) -> Int64[ndarray, " n"]:
    """Linears of equal sides, of which a model has many, are counted once."""
    shape = LinearShape("", out_features, in_features, layout)
    ranks = range(smallest, largest + 1, step)
    return np.diff(np.array([shape.params(rank) for rank in ranks], dtype=np.int64))
