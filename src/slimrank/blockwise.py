"""Block by block: moments, solves, the check on tokens, the swap."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimrank import processes
from slimrank.allocation import RankPlan
from slimrank.apart import made_apart
from slimrank.calibration import (
    ActivationStore,
    Batch,
    Batches,
    LastInputs,
    TokenWindows,
    after_blocks,
    check_on_tokens,
    collect_moments,
    default_batch_size,
    embed_batches,
    own_windows,
)
from slimrank.checkpoint import RunState
from slimrank.environment import Clock, gathered_warnings
from slimrank.errors import NumericalError, NumericalWarning
from slimrank.keeping import fill_block, keep_block
from slimrank.linalg import Decomposition, Moments, effective_rank, predicted_changes
from slimrank.methods import Method
from slimrank.model import Anatomy, InputGroup, LinearSite, let_go, replace_linear, staying
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.report import LinearReport
from slimrank.statistics import Statistics

Replacement = tuple[LowRankLinear, LinearReport]


@dataclass(frozen=True, slots=True)
class BlockPass:
    """What is known of a block when all tokens have passed it; its linears are still dense.

    Parameters
    ----------
    index : int
    block : nn.Module
    groups : tuple of InputGroup
    moments : dict of str to Moments
        By linear, over all batches. Empty without calibration, and once they are used up.
    last : dict of str to LastInputs
        By linear, what it received in the last batch.
    entering : Batch or None
        The last batch, in front of the block.
    influence : float
        See `slimrank.calibration.BlockInfluence`; 0.0 without calibration.
    influence_after_norm : float or None
        Of the last block, with the final norm counted in.
    """

    index: int
    block: nn.Module
    groups: tuple[InputGroup, ...]
    moments: dict[str, Moments]
    last: dict[str, LastInputs]
    entering: Batch | None
    influence: float
    influence_after_norm: float | None

    @property
    def sites(self) -> Iterator[LinearSite]:
        """Linears of the block, in call order."""
        return (site for group in self.groups for site in group.sites)


def pass_blocks(
    model: Any,
    anatomy: Anatomy,
    windows: TokenWindows | None,
    options: CompressionOptions,
    clock: Clock,
    store: ActivationStore,
    count: int,
    what: str,
    finished: int = 0,
) -> Iterator[BlockPass]:
    """Take the original activations through the blocks, one block after the other.

    Each block may be changed once it was yielded: the tokens have passed it.

    Parameters
    ----------
    model : PreTrainedModel
    anatomy : Anatomy
        Of the linears whose inputs are wanted.
    windows : TokenWindows or None
        Of all processes, each of which takes its own; None if no moments are needed.
    options : CompressionOptions
    clock : Clock
    store : ActivationStore
        Holds the hidden states of all tokens until they have passed.
    count : int
        How many blocks.
    what : str
        Description for the progress bar.
    finished : int
        Blocks that are known already: tokens only pass them, and they have no groups.

    Raises
    ------
    NumericalError
        If an activation is not finite.
    ModelError
        If the model cannot be replayed block by block.
    CheckpointError
        If hidden states go to disk, and it is full.
    """
    blocks = list(model.get_submodule(anatomy.path).children())
    batches = Batches(store)
    if windows:
        length = max(len(window) for window in windows.windows)
        size = options.batch_size or default_batch_size(length)
        with clock.phase("calibrate"):
            batches = embed_batches(model, anatomy, own_windows(windows), size, store)
    for index in options.track(range(count), what):
        groups = anatomy.groups[index] if index >= finished else ()
        entering = batches[-1] if batches else None
        moments: dict[str, Moments] = {}
        last: dict[str, LastInputs] = {}
        influence, after_norm = 0.0, None
        with staying(blocks[index]):
            if batches:
                behind = partial(after_blocks, model, anatomy) if index == len(blocks) - 1 else None
                with clock.phase("calibrate"):
                    seen = collect_moments(model, blocks[index], index, groups, batches, behind)
                influence, after_norm = seen.influence, seen.influence_behind
                for group, total, kept in zip(groups, seen.total, seen.last, strict=True):
                    moments |= dict.fromkeys((site.name for site in group.sites), total)
                    last |= dict.fromkeys((site.name for site in group.sites), kept)
                    del total
                del seen  # whoever has used the moments lets go of them
            yield BlockPass(
                index, blocks[index], groups, moments, last, entering, influence, after_norm
            )
        let_go(blocks[index])
    batches.drop()


@dataclass(frozen=True, slots=True)
class Solved:
    """One linear, solved for every rank that is asked for."""

    decomposition: Decomposition
    moments: Moments | None
    tokens: int
    seconds: float
    changes: Tensor | None = None


def solve(
    model: Any,
    site: LinearSite,
    columns: int,
    method: Method,
    moments: Moments | None,
    gradient: Tensor | None = None,
) -> Solved:
    """Decompose one linear, and keep what is worth storing of it.

    Parameters
    ----------
    model : PreTrainedModel
    site : LinearSite
    columns : int
        The largest rank that is asked for.
    method : Method
    moments : Moments or None
        With the ridge, if any.
    gradient : Tensor of shape (out, in), optional
        Of the loss by the weight: the changes of the loss are predicted from it then, for all
        components (see `slimrank.linalg.predicted_changes`).

    Raises
    ------
    NumericalError
        If the weight is not finite or has no solution, with the linear's name.

    Warns
    -----
    NumericalWarning
        If fewer tokens were seen than columns are asked for.
    """
    start = time.perf_counter()
    weight = model.get_submodule(site.name).weight.detach()
    tokens = moments.tokens if moments else 0
    if moments and tokens < columns:
        warnings.warn(
            f"{site.name} saw {tokens} tokens, fewer than its rank {columns}; what they leave open "
            "is settled by the weight alone",
            NumericalWarning,
            stacklevel=2,
        )
    try:
        solved = method.decompose(weight, moments)
    except NumericalError as error:
        raise type(error)(f"{site.name}: {error}") from error
    changes = None if gradient is None else predicted_changes(solved, gradient)
    kept = solved.shortened(columns, torch.promote_types(weight.dtype, torch.float32))
    seconds = time.perf_counter() - start
    return Solved(kept, moments, tokens, seconds, changes)


def check_block(
    model: Any, passed: BlockPass, replacements: Mapping[str, LowRankLinear], clock: Clock
) -> dict[str, float]:
    """Hold the moments of a block against real tokens (see `check_on_tokens`).

    Returns
    -------
    dict of str to float
        Relative gap by linear, the largest of all processes; empty without calibration.
    """
    if passed.entering is None:
        return {}
    with clock.phase("check"):
        gaps = check_on_tokens(
            model, passed.block, passed.index, passed.entering, replacements, passed.last
        )
        return joint_gaps(gaps, list(replacements))


def joint_gaps(gaps: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Largest gaps that any process has seen on its own tokens.

    Parameters
    ----------
    gaps : mapping of str to float
        By linear; one that saw no own tokens is left out.
    names : sequence of str
        Of all linears, the same in all processes.

    Examples
    --------
    >>> joint_gaps({"fc": 1e-6}, ["fc", "expert"])
    {'fc': 1e-06}
    """
    found = processes.largest([gaps.get(name, -1.0) for name in names])
    return {name: gap for name, gap in zip(names, found, strict=True) if gap >= 0}


def factorise_blocks(
    model: Any,
    anatomy: Anatomy,
    ranks: RankPlan,
    method: Method,
    ridge: float,
    windows: TokenWindows | None,
    options: CompressionOptions,
    clock: Clock,
    store: ActivationStore,
    statistics: Statistics | None = None,
    state: RunState | None = None,
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
    ridge : float
        Share of the mean diagonal that is added to the moments.
    windows : TokenWindows or None
        None if the method needs no moments, or nothing is factorised.
    options : CompressionOptions
    clock : Clock
    store : ActivationStore
        For hidden states on their way.
    statistics : Statistics, optional
        What else the method looks at.
    state : RunState, optional
        Keeps each finished block on disk. Those it holds already are taken from it: the tokens only
        pass through them.

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
    CheckpointError
        If the state is damaged, or the disk is full.
    """
    linears = {site.name: dense_report(site) for site in anatomy.sites}
    factored = anatomy.only(name for name, rank in ranks.ranks.items() if rank is not None)
    count = 1 + max((site.block for site in factored.sites), default=-1)
    finished = len(state.finished) if state else 0
    windows = windows if finished < count else None  # nothing is left to look at
    for passed in pass_blocks(
        model, factored, windows, options, clock, store, count, "compressing", finished
    ):
        path = f"{anatomy.path}.{passed.index}"
        if state is not None and passed.index < finished:
            with clock.phase("resume"):
                found = fill_block(state, model, passed.index, path)
            linears |= {report.name: report for report in found.linears}
            continue
        with gathered_warnings() as messages:
            made = _factorise_block(model, passed, ranks, method, ridge, clock, statistics)
        linears |= {report.name: report for report in made}
        keep_block(state, model, passed.index, path, made, clock, messages=messages)
    return list(linears.values())


def _factorise_block(
    model: Any,
    passed: BlockPass,
    ranks: RankPlan,
    method: Method,
    ridge: float,
    clock: Clock,
    statistics: Statistics | None,
) -> list[LinearReport]:
    """Solve the linears of a block, hold them against tokens, and replace them."""

    def make(site: LinearSite) -> Replacement:
        rank = ranks.ranks[site.name]
        assert rank is not None
        moments = passed.moments.get(site.name)
        moments = statistics.of(site.name, moments) if statistics else moments
        moments = moments.ridged(ridge) if moments else None
        solved = solve(model, site, rank, method, moments)
        return truncate(model, site, rank, solved, method)

    with clock.phase("solve"):
        made = replacements_apart(model, list(passed.sites), make)
    passed.moments.clear()
    gaps = check_block(model, passed, {name: layer for name, (layer, _) in made.items()}, clock)
    for name, (layer, _) in made.items():
        replace_linear(model, name, layer)
    return [
        report.model_copy(update={"token_check": gaps.get(name)})
        for name, (_, report) in made.items()
    ]


def replacements_apart(
    model: Any, sites: Sequence[LinearSite], make: Callable[[LinearSite], Replacement]
) -> dict[str, Replacement]:
    """Make the layers of some linears, each in one of the processes (see `made_apart`).

    Parameters
    ----------
    model : PreTrainedModel
        Not changed.
    sites : sequence of LinearSite
    make : callable
        Gives a layer and its report.
    """

    def pack(made: Replacement) -> tuple[str, dict[str, Tensor]]:
        layer, report = made
        return report.model_dump_json(), factor_tensors(layer)

    def unpack(site: LinearSite, text: str, tensors: Mapping[str, Tensor]) -> Replacement:
        report, linear = LinearReport.model_validate_json(text), model.get_submodule(site.name)
        return refilled(linear, tensors, report.pivoted), report

    return made_apart(sites, make, pack, unpack)


def factor_tensors(layer: LowRankLinear) -> dict[str, Tensor]:
    """Tensors that a layer has of its own; its bias is that of the linear."""
    return {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}


def refilled(
    linear: nn.Linear, tensors: Mapping[str, Tensor], pivoted: bool = False
) -> LowRankLinear:
    """Make a layer of `factor_tensors` again, in the place of its linear.

    Examples
    --------
    >>> linear = nn.Linear(4, 3)
    >>> layer = refilled(linear, factor_tensors(LowRankLinear.unfilled(linear, 2)))
    >>> layer.latent.weight.shape, layer.bias is linear.bias
    (torch.Size([2, 4]), True)
    """
    rank = len(tensors["latent.weight"])
    layer = LowRankLinear.unfilled(linear, rank, pivoted=pivoted)
    layer.load_state_dict(dict(tensors), strict=False)
    layer.bias = linear.bias
    return layer


def dense_report(site: LinearSite) -> LinearReport:
    """Report of a linear that stays as it is."""
    size = site.shape.dense_params
    return LinearReport(name=site.name, rank=None, params_before=size, params=size, tokens=0)


def truncate(
    model: Any,
    site: LinearSite,
    rank: int,
    solved: Solved,
    method: Method,
    split: Literal["orthonormal", "balanced"] = "orthonormal",
) -> tuple[LowRankLinear, LinearReport]:
    """Make the layer, and say what was promised and what the factors give.

    Parameters
    ----------
    model : PreTrainedModel
        Not changed.
    site : LinearSite
    rank : int
    solved : Solved
    method : Method
    split : {'orthonormal', 'balanced'}
        See `Decomposition.truncate`.
    """
    start = time.perf_counter()
    linear = model.get_submodule(site.name)
    found = solved.decomposition
    factors = found.truncate(rank, split)
    replacement = LowRankLinear.from_factors(linear, factors, site.shape.is_pivoted(rank))
    report = low_rank_report(
        site,
        rank,
        found,
        measured=method.loss(linear.weight, factors, solved.moments),
        stored=method.loss(linear.weight, replacement.factors(), solved.moments),
        tokens=solved.tokens,
    )
    seconds = solved.seconds + time.perf_counter() - start
    return replacement, report.model_copy(update={"seconds": seconds})


def low_rank_report(
    site: LinearSite,
    rank: int,
    found: Decomposition,
    measured: float,
    stored: float | None,
    tokens: int,
) -> LinearReport:
    """Report of a factorised linear; losses become shares of the energy of its outputs."""
    energy = found.energy or 1.0
    return LinearReport(
        name=site.name,
        rank=rank,
        pivoted=site.shape.is_pivoted(rank),
        params_before=site.shape.dense_params,
        params=site.shape.params(rank),
        tokens=tokens,
        effective_rank=effective_rank(found.singular_values),
        predicted_loss=found.loss(rank) / energy,
        measured_loss=measured / energy,
        stored_loss=None if stored is None else stored / energy,
        jitter=found.jitter,
    )
