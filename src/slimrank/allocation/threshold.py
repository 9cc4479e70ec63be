"""Zero Sum SVD's global selection: drop singular values anywhere, losses and gains in balance."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from torch import Tensor

from slimrank.allocation.budget import Budget, LinearShape, RankPlan, require_fixed
from slimrank.allocation.smallest import beside_smallest
from slimrank.errors import NumericalError


def threshold(
    shapes: Sequence[LinearShape],
    changes: Mapping[str, Tensor],
    budget: Budget,
    other_params: int = 0,
    *,
    fixed: Mapping[str, int] | None = None,
) -> RankPlan:
    r"""Drop the least singular values of the whole model, those that help against those that harm.

    Of the whitened weight ``W L = Σ_i σ_i u_i v_iᵀ``, with ``L Lᵀ`` the moment of the inputs, the
    loss is predicted to change, if component i goes, by

    .. math:: \Delta_i = -\sigma_i g_i, \qquad
        g_i = u_i^\top \frac{\partial \ell}{\partial W} L^{-\top} v_i

    to first order (see `slimrank.linalg.predicted_changes`). Each linear offers its smallest
    component that is left. Of all that are offered, that of the smallest absolute Δ goes next, out
    of those with Δ ≥ 0 while the sum of the changes so far is at most 0, and out of those with
    Δ < 0 otherwise; out of the others where there are none. So the sum stays near zero. A linear
    frees nothing until its rank is at break-even; one that never gets there stays dense, whatever
    it has dropped. It ends as soon as the budget is met.

    A larger budget ends earlier in the same order: no rank is smaller for it. The predicted loss is
    about zero for every budget, and no measure of them.

    Parameters
    ----------
    shapes : sequence of LinearShape
        The targeted linears.
    changes : mapping of str to Tensor of shape (min(out, in),)
        The predicted changes Δ, in the order of the components; their unit is immaterial. Not
        looked at where the rank is fixed. With singular values in their place the smallest goes
        next, wherever it is: the authors' ablation 'sval_mag_het', and what a global threshold is
        in its plain sense.
    budget : Budget
    other_params : int
        Parameters of the model outside the targets, for scope 'model'.
    fixed : mapping of str to int, optional
        Ranks decided elsewhere, paid first and returned as they are; see `uniform`.

    Returns
    -------
    RankPlan
        Within the budget, but for fixed ranks at `param_ratio` 1 (see `uniform`).

    Raises
    ------
    BudgetError
        If the smallest ranks are over the budget. If a fixed rank is out of its bounds.
    NumericalError
        If a change is not finite.
    ValueError
        If there are not ``min(out, in)`` of them.

    Notes
    -----
    After the authors' code (mint-vu/Zero-Sum-SVD, selection mode 'zero_sum'), in one stage:
    neither the steps of correction between its stages nor its storage of factors in 8 bits is here.
    Their gradient is a mean of the batches' mean losses under autocast; ours of all predicted
    tokens alike, in the model's dtype.
    Deviations. With `multiple_of` above 1 what goes is one group of components after another, with
    the sum of their changes, so that every rank is a multiple; at 1 it is one by one, as there. The
    least rank is the budget's, where theirs is a share of break-even. In the pivoted layout a step
    frees what that layout says. If the budget is not met with everything at its least rank, theirs
    goes on without a word; this raises.

    References
    ----------
    ZS-SVD (arXiv 2602.02848, ICML 2026).

    Examples
    --------
    Of 128 parameters 26 must go. By singular values b's go first: a stays dense, and b goes to
    break-even, rank 3, which frees 16, and to rank 2, which frees 16 more.

    >>> import torch
    >>> shapes = [LinearShape("a", 8, 8), LinearShape("b", 8, 8)]
    >>> values = {"a": torch.linspace(9, 8, 8), "b": torch.linspace(2, 1, 8)}
    >>> dict(threshold(shapes, values, Budget(0.8)).ranks)
    {'a': None, 'b': 2}
    """
    fixed = fixed or {}
    require_fixed(shapes, fixed)
    ranks: dict[str, int | None] = {s.name: fixed.get(s.name) for s in shapes}
    excess = RankPlan(ranks).params(shapes) - budget.target_params(shapes, other_params)
    if budget.param_ratio < 1 and excess > 0:
        free, _ = beside_smallest(shapes, budget, other_params, fixed)
        groups = [_Groups.of(s, _listed(s, changes[s.name]), budget) for s in free]
        _drop(groups, excess)
        ranks |= {g.shape.name: g.rank for g in groups if g.rank <= g.shape.break_even_rank}
    plan = RankPlan(ranks)
    plan.check(shapes, budget, other_params, fixed)
    return plan


def _listed(shape: LinearShape, changes: Tensor) -> list[float]:
    """Changes of one linear's components, checked."""
    if len(changes) != shape.full_rank:
        raise ValueError(f"{shape.name}: {shape.full_rank} changes are needed, not {len(changes)}")
    if not bool(changes.isfinite().all()):
        raise NumericalError(f"{shape.name}: its changes are not finite; calibrate again")
    values: list[float] = changes.double().tolist()
    return values


@dataclass(slots=True)
class _Groups:
    """Components of one linear in the order in which they go, and how far that has come."""

    shape: LinearShape
    changes: Sequence[float]
    stops: Sequence[int]
    rank: int
    gone: int = 0

    @classmethod
    def of(cls, shape: LinearShape, changes: Sequence[float], budget: Budget) -> "_Groups":
        """Group what leads from one multiple to the next lower one, from full rank on."""
        step = budget.multiple_of
        stops = range((shape.full_rank - 1) // step * step, budget.smallest_rank - 1, -step)
        bounds = pairwise([shape.full_rank, *stops])
        sums = [sum(changes[low:high]) for high, low in bounds]
        return cls(shape, sums, stops, shape.full_rank)

    def drop(self) -> int:
        """Let the next group go, and say how many parameters that frees."""
        before, self.rank = self._params(), self.stops[self.gone]
        self.gone += 1
        return before - self._params()

    def _params(self) -> int:
        return self.shape.params(self.rank if self.rank <= self.shape.break_even_rank else None)


def _drop(groups: Sequence[_Groups], excess: int) -> None:
    """Let groups go, by the zero-sum rule, until so many parameters are freed."""
    harming: list[tuple[float, int, _Groups]] = []
    helping: list[tuple[float, int, _Groups]] = []
    order = count()

    def offer(group: _Groups) -> None:
        if group.gone < len(group.changes):
            change = group.changes[group.gone]
            queue = harming if change >= 0 else helping
            heapq.heappush(queue, (abs(change), next(order), group))

    for group in groups:
        offer(group)
    total = 0.0
    while excess > 0:
        queue = (harming or helping) if total <= 0 else (helping or harming)
        _, _, group = heapq.heappop(queue)
        total += group.changes[group.gone]
        excess -= group.drop()
        offer(group)
