"""From a profile to a model of any size: ranks, factors, and no calibration."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimrank.allocation import RankPlan
from slimrank.blockwise import dense_report, low_rank_report
from slimrank.calibration import TokenWindows, hold_out
from slimrank.checkpoint import Profile, RunState
from slimrank.drawing import draw
from slimrank.environment import Clock, gathered_warnings
from slimrank.errors import CheckpointError
from slimrank.keeping import fill_block, keep_block
from slimrank.model import LinearSite, let_go, replace_linear, staying
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.profiling import ProfiledModel
from slimrank.recipe import CalibrationRecipe, CompressionRecipe
from slimrank.report import BlockReport, LinearReport, RanksReport, RefinementReport
from slimrank.search import dynamic_ranks, global_ranks, threshold_ranks
from slimrank.targets import Work


@dataclass(frozen=True, slots=True)
class Made:
    """What was done to a model's linears, for the report.

    Parameters
    ----------
    ranks : RankPlan
    linears : list of LinearReport
    calibration_fingerprint : str
    tokens : int
    probe : Tensor of shape (length,) or None
        Token ids to compare logits on.
    allocation : RanksReport or None
    blocks : tuple of BlockReport
        Of a sequential run.
    state : RunState or None
        What is kept of the run until its folder is written.
    tuning : RefinementReport or None
        Of all blocks together.
    """

    ranks: RankPlan
    linears: list[LinearReport]
    calibration_fingerprint: str
    tokens: int
    probe: Tensor | None
    allocation: RanksReport | None = None
    blocks: tuple[BlockReport, ...] = ()
    state: RunState | None = None
    tuning: RefinementReport | None = None


def hold_against(
    profile: Profile,
    source: ProfiledModel,
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows | None,
    tokenizer: Any,
) -> CompressionRecipe:
    """See that a profile is of this model, method and text, and covers the targets.

    Returns
    -------
    CompressionRecipe
        With the calibration that the profile was made with.

    Raises
    ------
    CheckpointError
        If it is of something else, by name.
    """
    manifest, where = profile.manifest, profile.folder
    dtype = str(next(source.model.parameters()).dtype).removeprefix("torch.")
    if manifest.dtype != dtype:
        raise CheckpointError(f"{where} is a profile in {manifest.dtype}; the model is in {dtype}")
    if manifest.model_fingerprint != source.fingerprint:
        raise CheckpointError(
            f"{where} is a profile of {manifest.model} with other weights than {source.name}; "
            "profile this model"
        )
    wanted = recipe.for_profile()
    if manifest.method != wanted.method:
        raise CheckpointError(
            f"{where} is a profile by {manifest.method}; the recipe asks for {wanted.method}"
        )
    if manifest.ridge != wanted.relative_ridge():
        raise CheckpointError(
            f"{where} is a profile with a ridge of {manifest.ridge:g}; the recipe asks for "
            f"{wanted.relative_ridge():g}"
        )
    settings = {key: manifest.settings.get(key) for key in wanted.method_settings()}
    if settings != wanted.method_settings():
        raise CheckpointError(
            f"{where} is a profile with {_listed(settings)}; the recipe asks for "
            f"{_listed(wanted.method_settings())}"
        )
    if windows is None and recipe.calibration not in (CalibrationRecipe(), manifest.calibration):
        drawn = draw(recipe.calibration, tokenizer, with_held_out=False)
        if drawn.fingerprint() != manifest.calibration_fingerprint:
            raise CheckpointError(
                f"{where} is a profile on other text than the recipe's; leave the calibration out, "
                "or profile on that text"
            )
    if windows is not None:
        own, _ = hold_out(windows, manifest.calibration.held_out_sequences)
        if manifest.calibration_fingerprint not in (windows.fingerprint(), own.fingerprint()):
            raise CheckpointError(f"{where} is a profile on other tokens than the windows given")
    lost = [name for name in work.names if name not in profile.linears]
    if lost:
        raise CheckpointError(
            f"{where} holds nothing of {len(lost)} targets, such as {lost[0]}; profile with "
            "these targets, and for a key/value cache of latents with --kv"
        )
    return recipe.model_copy(update={"calibration": manifest.calibration})


def _listed(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {'none' if x is None else x}" for key, x in settings.items())


def choose_ranks(
    model: Any,
    work: Work,
    recipe: CompressionRecipe,
    profile: Profile | None,
    options: CompressionOptions,
    clock: Clock,
) -> tuple[RankPlan, RanksReport | None]:
    """Share the budget out as the recipe says; a profile is needed unless evenly.

    Raises
    ------
    BudgetError
        If no ranks meet the budget.
    CheckpointError
        If the profile is damaged, or was made without gradients that the ranks are told from.
    """
    if recipe.allocation == "uniform":
        return work.uniform(recipe), None
    assert profile is not None
    with clock.phase("allocate"):
        if recipe.allocation == "global":
            return global_ranks(work, recipe, profile)
        if recipe.allocation == "threshold":
            return threshold_ranks(work, recipe, profile)
        return dynamic_ranks(model, work, recipe, profile, options)


def build(
    model: Any,
    work: Work,
    ranks: RankPlan,
    profile: Profile,
    options: CompressionOptions,
    clock: Clock,
    state: RunState | None = None,
) -> list[LinearReport]:
    """Replace the linears by factors from a profile's bases, block after block.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; its linears are replaced.
    work : Work
    ranks : RankPlan
    profile : Profile
        Of the recipe's method.
    options : CompressionOptions
    clock : Clock
    state : RunState, optional
        Keeps each finished block on disk. Those it holds already are taken from it.

    Returns
    -------
    list of LinearReport
        Of all targeted linears, in call order.

    Raises
    ------
    CheckpointError
        If the profile or the state is damaged, a rank is beyond what the profile keeps, or the disk
        is full.
    """
    linears: list[LinearReport] = []
    anatomy, finished = work.anatomy, len(state.finished) if state else 0
    for index in options.track(range(len(anatomy.groups)), "building"):
        path = f"{anatomy.path}.{index}"
        if state is not None and index < finished:
            with clock.phase("resume"):
                linears += fill_block(state, model, index, path).linears
            continue
        with clock.phase("build"), gathered_warnings() as messages:
            sites = [site for group in anatomy.groups[index] for site in group.sites]
            with staying(model.get_submodule(path)):
                made = [_replace(model, site, ranks.ranks[site.name], profile) for site in sites]
        linears += made
        keep_block(state, model, index, path, made, clock, messages=messages)
        let_go(model.get_submodule(path))
    return linears


def _replace(model: Any, site: LinearSite, rank: int | None, profile: Profile) -> LinearReport:
    """Put factors in the place of one linear, unless it stays dense."""
    if rank is None:
        return dense_report(site)
    start = time.perf_counter()
    entry = profile.linears[site.name]
    linear = model.get_submodule(site.name)
    found = profile.decomposition(site.name, linear.weight, rank)
    pivoted = site.shape.is_pivoted(rank)
    layer = LowRankLinear.from_factors(linear, found.truncate(rank), pivoted)
    replace_linear(model, site.name, layer)
    measured = float(profile.measured[site.name][rank])
    report = low_rank_report(site, rank, found, measured, stored=None, tokens=entry.tokens)
    seconds = time.perf_counter() - start
    return report.model_copy(update={"token_check": entry.token_check, "seconds": seconds})
