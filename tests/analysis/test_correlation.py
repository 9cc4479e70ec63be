"""Coefficients worked out by hand, and the cases in which there are none."""

import math

import pytest

from slimrank.analysis import correlate


def test_by_hand():
    # deviations -1 0 1 0 and -2 1 0 1 (of 1 2 3 2 and 1 4 3 4): r = 2 / sqrt(2 * 6)
    found = correlate([1.0, 2.0, 3.0, 2.0], [1.0, 4.0, 3.0, 4.0])
    assert found.num_blocks == 4
    assert found.pearson.value == pytest.approx(2 / math.sqrt(12), rel=1e-12)
    # ranks 1 2.5 4 2.5 and 1 3.5 2 3.5: deviations -1.5 0 1.5 0 and -1.5 1 -0.5 1
    assert found.spearman.value == pytest.approx(1.5 / math.sqrt(4.5 * 4.5), rel=1e-12)
    assert found.pearson.sign == found.spearman.sign == "positive"


def test_a_straight_line_down_and_its_exact_chance():
    found = correlate([4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4])
    assert found.pearson.value == pytest.approx(-1, abs=1e-12)
    assert (found.pearson.sign, found.spearman.sign) == ("negative", "negative")
    assert found.spearman.p_value == pytest.approx(2 / 24)  # of 24 orders, this and its reverse


def test_p_value_of_pearson_by_hand():
    # n = 3: r is the cosine of a uniform angle, so P(|r| >= 1/2) = 2 arccos(1/2) / pi = 2/3
    found = correlate([-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0])
    assert found.pearson.value == pytest.approx(0.5)
    assert found.pearson.p_value == pytest.approx(2 / 3)


def test_zero_is_neither_sign():
    found = correlate([1.0, 2.0, 3.0], [1.0, 2.0, 1.0])
    assert found.pearson.value == pytest.approx(0, abs=1e-15)
    assert (found.pearson.sign, found.spearman.sign) == ("zero", "zero")
    assert found.pearson.p_value == pytest.approx(1)


def test_monotone_but_bent_is_perfect_for_spearman_only():
    first = [float(i) for i in range(20)]
    found = correlate(first, [math.exp(-value) for value in first])
    assert found.spearman.value == pytest.approx(-1)
    assert -0.8 < found.pearson.value < 0
    assert found.spearman.p_value < 1e-12


@pytest.mark.parametrize(
    ("importance", "rank", "reason"),
    [
        ([], [], "0 blocks, and 3 are needed"),
        ([0.5], [0.5], "1 block, and 3 are needed"),
        ([0.5, 0.6], [0.5, 0.4], "2 blocks, and 3 are needed"),
        ([0.3, 0.3, 0.3], [0.1, 0.2, 0.3], "the importance is the same in all blocks"),
        ([0.3, 0.3, 0.3 + 1e-13], [0.1, 0.2, 0.3], "the importance is the same in all blocks"),
        ([0.0, 0.0, 0.0], [0.1, 0.2, 0.3], "the importance is the same in all blocks"),
        ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], "the effective rank is the same in all blocks"),
    ],
)
def test_no_coefficient_without_a_reason(importance, rank, reason):
    found = correlate(importance, rank)
    assert (found.pearson, found.spearman) == (None, None)
    assert (found.num_blocks, found.reason) == (len(importance), reason)


def test_scale_does_not_matter():
    first, second = [0.01, 0.5, 0.02, 0.3], [0.9, 0.1, 0.5, 0.4]
    small = correlate([1e-8 * value for value in first], second)
    assert small.pearson.value == pytest.approx(correlate(first, second).pearson.value)
    assert small.spearman == correlate(first, second).spearman
