"""The variance that losses are shares of."""

import pytest
import torch

from slimrank.refine.data import target_variance
from tolerances import TOLERANCE


def with_targets(make_pairs, change, size=2):
    _, pairs = make_pairs(lengths=(8, 5, 8, 3))
    return pairs.again(size, [change(target) for target in pairs.targets])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_it_is_that_of_all_elements_together(make_pairs, size, offset):
    pairs = with_targets(make_pairs, lambda target: 3 * target + offset, size)
    expected = float(torch.cat(pairs.targets).var(correction=0))
    spread = max(1.0, offset)  # what an element's rounding is relative to
    assert target_variance(pairs) == pytest.approx(
        expected, rel=TOLERANCE["moment", torch.float64] * spread
    )


def test_bfloat16_is_summed_in_float64(make_pairs):
    pairs = with_targets(make_pairs, lambda target: target.bfloat16())
    pairs.inputs = [states.bfloat16() for states in pairs.inputs]
    expected = float(torch.cat(pairs.targets).double().var(correction=0))
    assert target_variance(pairs) == pytest.approx(expected, rel=TOLERANCE["moment", torch.float64])


def test_equal_elements_have_none(make_pairs):
    assert target_variance(with_targets(make_pairs, lambda target: target * 0 + 0.1)) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(make_pairs, bad):
    def spoil(target):
        target = target.clone()
        target[1, 2] = bad
        return target

    variance = target_variance(with_targets(make_pairs, spoil))
    assert not torch.tensor(variance).isfinite()
