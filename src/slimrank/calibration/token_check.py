"""What moments say, held against what tokens say."""

import sys

from slimrank.errors import NumericalError

TOKEN_CHECK = 5e-3


def gap_on_tokens(name: str, seen: float, expected: float, least: float) -> float:
    """Relative gap between an error on tokens and the one that their moments give.

    Parameters
    ----------
    name : str
        Of the linear.
    seen : float
        Mean squared error over the tokens, taken token by token.
    expected : float
        The same from the moments of these tokens.
    least : float
        What the error is told apart from zero by, given its rounding; a smaller one counts as that.

    Raises
    ------
    NumericalError
        If the gap is over `TOKEN_CHECK` or not a number: the moments are then not those of what
        the linear receives.

    Examples
    --------
    >>> round(gap_on_tokens("q_proj", 2.0, 2.002, 0.0), 6)
    0.001
    """
    gap = abs(seen - expected) / max(seen, least, sys.float_info.min)
    if not gap <= TOKEN_CHECK:
        raise NumericalError(
            f"{name}: the error on the tokens last seen is {seen:.6g}, but their moments say "
            f"{expected:.6g}; please report this model"
        )
    return gap
