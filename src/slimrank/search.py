"""Ranks from a profile: Swift-SVD's, by a search on held-out text; and those told at once."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from slimrank.allocation import LinearProfile, RankPlan, allocate_global, swift, threshold
from slimrank.calibration import TokenWindows
from slimrank.checkpoint import Profile
from slimrank.errors import CheckpointError, NumericalWarning, TextError
from slimrank.evaluation import windows_perplexity
from slimrank.linalg import tail_energy
from slimrank.model import let_go, replace_linear, staying
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.report import (
    AllocationReport,
    GlobalRanksReport,
    ImportanceWeightTrial,
    ThresholdReport,
)
from slimrank.targets import Work

IMPORTANCE_WEIGHTS = tuple(step / 10 for step in range(11))


def dynamic_ranks(
    model: Any,
    work: Work,
    recipe: CompressionRecipe,
    profile: Profile,
    options: CompressionOptions,
) -> tuple[RankPlan, AllocationReport]:
    """Ranks by Swift-SVD's algorithm 2, with α given or searched.

    The search makes a model for each of eleven α and for uniform ranks, all from the same factors,
    and takes the α of the least perplexity on the held-out part of the calibration text. The paper
    says "on a validation set" and appears to choose on the reported test score.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; left as it is.
    work : Work
    recipe : CompressionRecipe
    profile : Profile
    options : CompressionOptions

    Returns
    -------
    ranks : RankPlan
    report : AllocationReport

    Raises
    ------
    TextError
        If α is to be searched and no text was held out.

    Warns
    -----
    NumericalWarning
        If uniform ranks do better on the held-out text than every α.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), section 4 and algorithm 2.
    """
    start = time.perf_counter()
    settings = recipe.swift
    names = set(work.names)
    profiles = [
        linear
        for linear in profile.allocation_profiles(recipe.layout, settings.importance_after_norm)
        if linear.shape.name in names
    ]

    if settings.importance_weight is not None:
        weight = settings.importance_weight
        return _plan(profiles, work, recipe, weight), AllocationReport(
            importance_weight=weight, retained_share=settings.retained_share
        )
    held_out = require_held_out(profile.held_out(), str(profile.folder))
    plans = {w: _plan(profiles, work, recipe, w) for w in IMPORTANCE_WEIGHTS}
    uniform = work.uniform(recipe)
    candidates = [*plans.values(), uniform]
    scores = _score(model, profile, candidates, held_out, options)
    trials = tuple(
        ImportanceWeightTrial(importance_weight=w, perplexity=score)
        for w, score in zip(plans, scores, strict=False)
    )
    best = min(trials, key=lambda trial: trial.perplexity)
    if scores[-1] < best.perplexity:
        warnings.warn(
            f"uniform ranks do better on the held-out text: perplexity {scores[-1]:.4f} against "
            f"{best.perplexity:.4f} at the best importance weight, {best.importance_weight:g}",
            NumericalWarning,
            stacklevel=2,
        )
    return plans[best.importance_weight], AllocationReport(
        importance_weight=best.importance_weight,
        retained_share=settings.retained_share,
        trials=trials,
        uniform_perplexity=scores[-1],
        held_out_tokens=held_out.tokens,
        held_out_fingerprint=held_out.fingerprint(),
        seconds=time.perf_counter() - start,
    )


def global_ranks(
    work: Work, recipe: CompressionRecipe, profile: Profile
) -> tuple[RankPlan, GlobalRanksReport]:
    """Ranks that lose least in sum, in the unit of the recipe, from a profile's spectra.

    Unit 'kfac' halves the losses of `kfac-svd`: nats a token, to second order. 'gradient' takes the
    mean squared gradient at a linear's outputs for the whole of that metric; 'relative' counts each
    loss as a share of the energy of the linear's outputs, whatever the model makes of them.

    Parameters
    ----------
    work : Work
    recipe : CompressionRecipe
    profile : Profile

    Raises
    ------
    BudgetError
        If no ranks meet the budget.
    CheckpointError
        If the profile has no gradients, and the unit asks for them.
    """
    start = time.perf_counter()
    settings = recipe.global_ranks
    losses = {
        shape.name: _weight(profile, shape.name, settings.unit)
        * tail_energy(profile.spectra[shape.name])
        for shape in work.shapes
    }
    found = allocate_global(
        work.shapes,
        losses,
        recipe.budget.budget(),
        work.other_params,
        fixed=work.fixed,
        may_stay_dense=settings.may_stay_dense,
    )
    return found.plan, GlobalRanksReport(
        unit=settings.unit,
        predicted_loss=found.predicted_loss,
        marginal=found.marginal,
        seconds=time.perf_counter() - start,
    )


def threshold_ranks(
    work: Work, recipe: CompressionRecipe, profile: Profile
) -> tuple[RankPlan, ThresholdReport]:
    """Ranks by Zero Sum SVD's rule, from the changes of the loss that a profile predicts.

    They are of the components of the profile's method: the paper's own for 'swift-svd' and
    'svd-llm', those in the metric for 'kfac-svd'. Every other method has the ranks of 'swift-svd'.

    Parameters
    ----------
    work : Work
    recipe : CompressionRecipe
    profile : Profile

    Raises
    ------
    BudgetError
        If no ranks meet the budget.
    CheckpointError
        If the profile has no such changes.

    References
    ----------
    ZS-SVD (arXiv 2602.02848); see `slimrank.allocation.threshold` for deviations.
    """
    start = time.perf_counter()
    if any(name not in profile.changes for name in work.names):
        raise CheckpointError(
            f"{profile.folder} was made without the weight gradients that allocation 'threshold' "
            "looks at; leave --profile out, or profile by a recipe with this allocation"
        )
    plan = threshold(
        work.shapes,
        profile.changes,
        recipe.budget.budget(),
        work.other_params,
        fixed=work.fixed,
    )
    chosen = {n: r for n, r in plan.ranks.items() if r is not None and n not in work.fixed}
    gone = [profile.changes[name][rank:] for name, rank in chosen.items()]
    return plan, ThresholdReport(
        predicted_change=sum(float(changes.sum()) for changes in gone),
        rise=sum(float(changes.clamp_min(0).sum()) for changes in gone),
        seconds=time.perf_counter() - start,
    )


def _weight(profile: Profile, name: str, unit: str) -> float:
    """What a linear's losses count."""
    entry = profile.linears[name]
    if unit == "kfac":
        return 0.5
    if unit == "relative":
        return 1 / entry.energy if entry.energy else 0.0
    if entry.mean_square_gradient is None:
        raise CheckpointError(
            f"{profile.folder} was made without gradients, which unit 'gradient' counts in; "
            "profile with the same recipe"
        )
    return 0.5 * entry.mean_square_gradient


def require_held_out(held_out: TokenWindows | None, where: str) -> TokenWindows:
    """See that there is text to choose by.

    Raises
    ------
    TextError
    """
    if held_out is None:
        raise TextError(
            f"{where} holds no held-out text to choose by; calibrate on at least two sequences and "
            "hold one of them out, or give --importance-weight"
        )
    return held_out


def _plan(
    profiles: list[LinearProfile], work: Work, recipe: CompressionRecipe, importance_weight: float
) -> RankPlan:
    return swift(
        profiles,
        recipe.budget.budget(),
        work.other_params,
        importance_weight=importance_weight,
        retained_share=recipe.swift.retained_share,
        fixed=work.fixed,
    )


def _score(
    model: Any,
    profile: Profile,
    plans: list[RankPlan],
    held_out: TokenWindows,
    options: CompressionOptions,
) -> list[float]:
    """Perplexity of each plan; plans that agree are measured once."""
    largest = {
        name: max(plan.ranks[name] or 0 for plan in plans)
        for name, rank in plans[0].ranks.items()
        if rank is not None
    }
    layers = {name: _layer(model, profile, name, rank) for name, rank in largest.items()}
    known: dict[tuple[int | None, ...], float] = {}
    scores: list[float] = []
    for number in options.track(range(len(plans)), "choosing ranks"):
        ranks = plans[number].ranks
        key = tuple(ranks.values())
        if key not in known:
            smaller = {name: _first(layer, ranks[name]) for name, layer in layers.items()}
            with _swapped_in(model, smaller):
                known[key] = windows_perplexity(model, held_out).value
        scores.append(known[key])
    return scores


def _layer(model: Any, profile: Profile, name: str, rank: int) -> LowRankLinear:
    linear = model.get_submodule(name)
    with staying(linear):
        factors = profile.decomposition(name, linear.weight, rank).truncate(rank)
        layer = LowRankLinear.from_factors(linear, factors)
    let_go(linear)
    return layer.to(linear.weight.device)


def _first(layer: LowRankLinear, rank: int | None) -> LowRankLinear:
    """A layer of the first ranks of another; shares its memory."""
    assert rank is not None
    smaller = LowRankLinear(layer.in_features, layer.out_features, rank, bias=False, device="meta")
    smaller.latent.weight = nn.Parameter(layer.latent.weight.detach()[:rank], False)
    smaller.expand.weight = nn.Parameter(layer.expand.weight.detach()[:, :rank], False)
    smaller.bias = layer.bias
    smaller.weight = layer.weight
    return smaller.eval()


@contextmanager
def _swapped_in(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers into a model for a while."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_linear(model, name, layer)
        yield
    finally:
        for name, linear in before.items():
            replace_linear(model, name, linear)
