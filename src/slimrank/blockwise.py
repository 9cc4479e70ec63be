"""Block by block: moments, solves, the check on tokens, the swap."""

import time
import warnings
from typing import Any

from torch import nn

from slimrank.allocation import RankPlan
from slimrank.calibration import (
    Batch,
    TokenWindows,
    check_on_tokens,
    collect_moments,
    default_batch_size,
    embed_batches,
)
from slimrank.environment import Clock
from slimrank.errors import NumericalError, NumericalWarning
from slimrank.linalg import Moments, effective_rank, output_loss
from slimrank.methods import Method
from slimrank.model import Anatomy, LinearSite, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.report import LinearReport


def factorise_blocks(
    model: Any,
    anatomy: Anatomy,
    ranks: RankPlan,
    method: Method,
    windows: TokenWindows | None,
    options: CompressionOptions,
    clock: Clock,
) -> list[LinearReport]:
    """Take the original activations through the blocks; factorise each when they have passed.

    Parameters
    ----------
    model : PreTrainedModel
        Its linears are replaced one block after the other.
    anatomy : Anatomy
        Of the targeted linears.
    ranks : RankPlan
    method : Method
    windows : TokenWindows or None
        None if the method needs no moments, or nothing is factorised.
    options : CompressionOptions
    clock : Clock

    Returns
    -------
    list of LinearReport
        Of all targeted linears, in call order.

    Raises
    ------
    NumericalError
        If a weight or an activation is not finite, or a moment does not fit its tokens.
    ModelError
        If the model cannot be replayed block by block.
    """
    linears = {
        site.name: LinearReport(
            name=site.name,
            rank=None,
            params_before=site.shape.dense_params,
            params=site.shape.dense_params,
            tokens=0,
        )
        for site in anatomy.sites
    }
    factored = anatomy.only(name for name, rank in ranks.ranks.items() if rank is not None)
    blocks = list(model.get_submodule(anatomy.path).children())
    last = max((site.block for site in factored.sites), default=-1)
    batches: list[Batch] = []
    if windows:
        length = max(len(window) for window in windows.windows)
        size = options.batch_size or default_batch_size(length)
        with clock.phase("calibrate"):
            batches = embed_batches(model, anatomy, windows, size)
    for index in options.track(range(last + 1), "compressing"):
        for linear in _block(model, blocks[index], index, factored, ranks, method, batches, clock):
            linears[linear.name] = linear
    return list(linears.values())


def _block(
    model: Any,
    block: nn.Module,
    index: int,
    anatomy: Anatomy,
    ranks: RankPlan,
    method: Method,
    batches: list[Batch],
    clock: Clock,
) -> list[LinearReport]:
    """Moments of one block, its solves, the check on tokens, the swap."""
    groups = anatomy.groups[index]
    moments: dict[str, Moments] = {}
    of_last: dict[str, Moments] = {}
    entering = batches[-1] if batches else None
    if batches:
        with clock.phase("calibrate"):
            collected = collect_moments(model, block, index, groups, batches)
        for group, total, last in zip(groups, collected.total, collected.last, strict=True):
            moments |= dict.fromkeys((site.name for site in group.sites), total)
            of_last |= dict.fromkeys((site.name for site in group.sites), last)
    replacements: dict[str, LowRankLinear] = {}
    reports: list[LinearReport] = []
    with clock.phase("solve"):
        for site in (site for group in groups for site in group.sites):
            rank = ranks.ranks[site.name]
            assert rank is not None
            replacement, linear = _solve(model, site, rank, method, moments.get(site.name))
            replacements[site.name] = replacement
            reports.append(linear)
    gaps: dict[str, float] = {}
    if entering is not None:
        with clock.phase("check"):
            gaps = check_on_tokens(model, block, index, entering, replacements, of_last)
    for name, replacement in replacements.items():
        replace_linear(model, name, replacement)
    return [r.model_copy(update={"token_check": gaps.get(r.name)}) for r in reports]


def _solve(
    model: Any, site: LinearSite, rank: int, method: Method, moments: Moments | None
) -> tuple[LowRankLinear, LinearReport]:
    """Solve one linear, and say what was promised and what the factors give."""
    start = time.perf_counter()
    linear = model.get_submodule(site.name)
    tokens = moments.tokens if moments else 0
    if moments and tokens < rank:
        warnings.warn(
            f"{site.name} saw {tokens} tokens, fewer than its rank {rank}; what they leave open is "
            "settled by the weight alone",
            NumericalWarning,
            stacklevel=2,
        )
    try:
        solved = method.decompose(linear.weight.detach(), moments)
    except NumericalError as error:
        raise type(error)(f"{site.name}: {error}") from error
    factors = solved.truncate(rank)
    replacement = LowRankLinear.from_factors(linear, factors)
    moment = moments.original if moments else None
    energy = solved.energy or 1.0
    report = LinearReport(
        name=site.name,
        rank=rank,
        params_before=site.shape.dense_params,
        params=site.shape.params(rank),
        tokens=tokens,
        effective_rank=effective_rank(solved.singular_values),
        predicted_loss=solved.loss(rank) / energy,
        measured_loss=output_loss(linear.weight, factors, moment) / energy,
        stored_loss=output_loss(linear.weight, replacement.factors(), moment) / energy,
        jitter=solved.jitter,
        seconds=time.perf_counter() - start,
    )
    return replacement, report
