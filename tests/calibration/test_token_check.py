import math
import re

import pytest

from slimrank.calibration import gap_on_tokens
from slimrank.errors import NumericalError


def test_the_gap_is_relative_to_what_was_seen():
    assert gap_on_tokens("q", 2.0, 1.996, 0.0) == pytest.approx(2e-3)


def test_what_is_least_stands_in_for_a_smaller_error():
    assert gap_on_tokens("q", 1e-9, 2e-9, 1e-6) == pytest.approx(1e-3)
    assert gap_on_tokens("q", 0.0, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("expected", [1.98, 2.02, math.nan, math.inf])
def test_a_larger_gap_is_refused_with_both_figures(expected):
    message = f"q: the error on the tokens last seen is 2, but their moments say {expected:g}"
    with pytest.raises(NumericalError, match=re.escape(message)):
        gap_on_tokens("q", 2.0, expected, 1e-6)
