"""The lower hull against brute force, and that long chains of removals end early."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.allocation import hull
from slimrank.allocation.hull import lower_hull

relaxed = settings(deadline=None, max_examples=200)

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=14).map(
    lambda steps: (list(itertools.accumulate(c for c, _ in steps)), [loss for _, loss in steps])
)


def hull_of(costs, losses):
    return lower_hull(np.array(costs), np.array(losses, dtype=np.float64)).tolist()


def is_above_some_chord(j, costs, losses):
    return any(
        (losses[j] - losses[i]) * (costs[k] - costs[i])
        > (losses[k] - losses[i]) * (costs[j] - costs[i])
        for i in range(j)
        for k in range(j + 1, len(costs))
    )


@given(points=POINTS)
@relaxed
def test_against_all_chords(points):
    """Whole numbers, so that what lies on an edge does so exactly."""
    costs, losses = points
    expected = [j for j in range(len(costs)) if not is_above_some_chord(j, costs, losses)]
    assert hull_of(costs, losses) == expected


def test_points_on_an_edge_are_kept():
    assert hull_of([0, 1, 3, 4], [8, 6, 2, 0]) == [0, 1, 2, 3]
    assert hull_of([0, 1, 3, 4], [0, 0, 0, 0]) == [0, 1, 2, 3]


def test_one_and_two_points():
    assert hull_of([7], [1]) == [0]
    assert hull_of([7, 9], [1, 5]) == [0, 1]


def test_a_chain_that_unravels_point_by_point_takes_few_rounds(monkeypatch):
    """A convex arc and a deep end behind a lip: the tangent stops at the lip, and yet it is short.

    Neighbours alone would take a round for each of a thousand points.
    """
    rounds = []
    chords = hull._above_chords

    def counted(costs, losses, stride):
        rounds.append(stride)
        return chords(costs, losses, stride)

    monkeypatch.setattr(hull, "_above_chords", counted)
    arc = [(2000 - x) ** 2 + 2_000_000 for x in range(1500)]
    costs = [*range(1500), 1600, 1601]
    losses = [*arc, 100_000, 99_999]
    kept = hull_of(costs, losses)
    assert kept[-2:] == [1500, 1501]
    assert 1000 < 1500 - kept[-3] < 1500
    assert not any(
        is_above_some_chord(j, [costs[i] for i in kept[-9:]], [losses[i] for i in kept[-9:]])
        for j in range(1, 8)
    )
    assert len(rounds) < 60
