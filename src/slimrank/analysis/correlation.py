"""Do important blocks have low effective ranks? Two coefficients, each with its chance."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slimrank.errors import extra_needed

FEWEST = 3
EXACT_UP_TO = 7  # blocks: 5,040 orders to walk through
NO_SPREAD = 1e-9
ROUNDING = 1e-12


class Coefficient(BaseModel):
    """A correlation coefficient.

    Parameters
    ----------
    value : float
        In [-1, 1].
    sign : {'negative', 'zero', 'positive'}
        Zero up to rounding.
    p_value : float
        Chance of a value at least as far from zero if the two had nothing to do with each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    sign: Literal["negative", "zero", "positive"]
    p_value: float


class Correlation(BaseModel):
    """What some blocks say; either both coefficients or the reason why there are none.

    Parameters
    ----------
    num_blocks : int
    pearson, spearman : Coefficient or None
        Of the values, and of their ranks.
    reason : str or None
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_blocks: int
    pearson: Coefficient | None = None
    spearman: Coefficient | None = None
    reason: str | None = None


def correlate(importance: Sequence[float], effective_rank: Sequence[float]) -> Correlation:
    """Correlate importance and normalised effective rank, one pair a block.

    Pearson's p-value takes both for normally distributed. Spearman's is exact up to seven blocks,
    by going through all orders, and beyond them comes from the t distribution.

    Parameters
    ----------
    importance, effective_rank : sequence of float
        Of equal length.

    Returns
    -------
    Correlation
        Without coefficients where there are fewer than three blocks, or one of the two is the same
        in all of them.

    Raises
    ------
    SlimrankError
        If scipy is not installed.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), section 4 and figure 3, claims a negative correlation.

    Examples
    --------
    >>> found = correlate([1.0, 2.0, 3.0], [0.3, 0.2, 0.1])
    >>> found.spearman.sign, round(found.spearman.p_value, 6)  # 2 of the 6 orders are as extreme
    ('negative', 0.333333)
    >>> correlate([1.0, 2.0], [0.3, 0.2]).reason
    '2 blocks, and 3 are needed'
    """
    count = len(importance)
    if count < FEWEST:
        reason = f"{count} block{'' if count == 1 else 's'}, and {FEWEST} are needed"
        return Correlation(num_blocks=count, reason=reason)
    for what, values in (("importance", importance), ("effective rank", effective_rank)):
        if max(values) - min(values) <= NO_SPREAD * max(map(abs, values)):
            return Correlation(num_blocks=count, reason=f"the {what} is the same in all blocks")
    stats = _scipy_stats()
    pearson = stats.pearsonr(importance, effective_rank)
    spearman = stats.spearmanr(importance, effective_rank)
    exact = count <= EXACT_UP_TO
    return Correlation(
        num_blocks=count,
        pearson=_coefficient(pearson.statistic, pearson.pvalue),
        spearman=_coefficient(
            spearman.statistic,
            _exact_p_value(stats, importance, effective_rank) if exact else spearman.pvalue,
        ),
    )


def _exact_p_value(stats: Any, first: Sequence[float], second: Sequence[float]) -> float:
    """Share of all orders that give ranks at least as strong a correlation, on both sides."""
    fixed = stats.rankdata(first)

    def strength(order: Any, axis: int) -> Any:
        return (order * fixed).sum(axis=axis)

    test = stats.permutation_test(
        (stats.rankdata(second),),
        strength,
        permutation_type="pairings",
        n_resamples=math.factorial(len(first)),
        vectorized=True,
    )
    return float(test.pvalue)


def _coefficient(value: float, p_value: float) -> Coefficient:
    sign: Literal["negative", "zero", "positive"]
    sign = "zero" if abs(value) < ROUNDING else "negative" if value < 0 else "positive"
    return Coefficient(value=float(value), sign=sign, p_value=float(p_value))


def _scipy_stats() -> Any:
    with extra_needed("correlations need scipy", "analysis"):
        from scipy import stats
    return stats
