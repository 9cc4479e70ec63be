"""The lower convex hull of what a linear loses against what it costs."""

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray


def lower_hull(
    costs: Int64[ndarray, " points"], losses: Float64[ndarray, " points"]
) -> Int64[ndarray, " kept"]:
    """Find the points that no chord between two others passes below.

    First the tangent from the last point: it is the far one where a linear may stay dense, and
    hides most of what it hides at once. Then points above the chord of their neighbours go, all of
    them together, until none is left: such a point is no vertex, whichever of its neighbours go
    too, and a chain in which every corner is convex is the hull. Chords between points 2, 4, 8 ...
    further on, tried while they find any, hold the number of rounds to about the logarithm of the
    number of points; what is correct rests on the nearest ones alone.

    Parameters
    ----------
    costs : array of shape (points,), int64
        Rising, at least one.
    losses : array of shape (points,), float64

    Returns
    -------
    array of shape (kept,), int64
        Positions, ascending, with the first and the last. Points *on* an edge are kept, as far as
        float64 can tell.

    Examples
    --------
    The third lies above the chord from the second to the fifth, the fourth upon it.

    >>> costs = np.array([0, 1, 2, 3, 5])
    >>> losses = np.array([9.0, 4.0, 3.5, 2.0, 0.0])
    >>> lower_hull(costs, losses).tolist()
    [0, 1, 3, 4]
    """
    kept = _before_tangent(costs, losses)
    at, height = costs[kept].astype(np.float64), losses[kept]
    stride, before = 1, len(kept)
    while True:
        above = _above_chords(at, height, stride)
        gone = int(np.count_nonzero(above))
        if gone == 0 and stride == 1:
            return kept
        if gone > 0:
            kept, at, height = kept[~above], at[~above], height[~above]
        unravels = 2 * gone >= before
        stride, before = (2 * stride if unravels else 1), max(gone, 1)


def _before_tangent(
    costs: Int64[ndarray, " points"], losses: Float64[ndarray, " points"]
) -> Int64[ndarray, " kept"]:
    """Positions up to where the tangent from the last point touches, and the last."""
    last = len(costs) - 1
    if last == 0:
        return np.zeros(1, dtype=np.int64)
    falls = (losses[:-1] - losses[-1]) / (costs[-1] - costs[:-1])
    touches = last - 1 - int(falls[::-1].argmin())  # the last of several
    return np.append(np.arange(touches + 1), last)


def _above_chords(
    costs: Float64[ndarray, " points"], losses: Float64[ndarray, " points"], stride: int
) -> Bool[ndarray, " points"]:
    """Whether each point lies above the chord of the points so far before and behind it.

    The ends stand in for what would be beyond them, and lie above nothing.
    """
    size = len(costs)
    rises, falls = _rises(costs, stride), _rises(losses, stride)
    above: ndarray = falls[:size] * rises[stride:] > falls[stride:] * rises[:size]
    return above


def _rises(values: Float64[ndarray, " points"], stride: int) -> Float64[ndarray, " longer"]:
    """Differences over so many points, the ends repeated so often."""
    repeated = np.concatenate([values[:1].repeat(stride), values, values[-1:].repeat(stride)])
    rises: ndarray = repeated[stride:] - repeated[:-stride]
    return rises
