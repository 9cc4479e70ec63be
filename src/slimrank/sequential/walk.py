"""The walk over the blocks: two streams through each, from disk or compressed in its turn."""

from collections.abc import Mapping
from typing import Any

from slimrank.allocation import RankPlan
from slimrank.blockwise import dense_report
from slimrank.calibration import RestOfModel, Streams, keep_final, step_forward
from slimrank.checkpoint import RunState
from slimrank.environment import Clock, gathered_warnings
from slimrank.keeping import keep_block
from slimrank.model import Anatomy, let_go, staying
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.sequential.block import BlockInTurn
from slimrank.sequential.resume import resume_block
from slimrank.sequential.walked import Walk
from slimrank.statistics import Statistics


def factorise_in_sequence(
    model: Any,
    anatomy: Anatomy,
    ranks: RankPlan,
    fixed: Mapping[str, int],
    recipe: CompressionRecipe,
    streams: Streams,
    options: CompressionOptions,
    clock: Clock,
    state: RunState | None = None,
    statistics: Statistics | None = None,
) -> Walk:
    """Compress the blocks in order, each from what arrives once those before it are compressed.

    Parameters
    ----------
    model : PreTrainedModel
        Its blocks are changed one after the other.
    anatomy : Anatomy
        Of the targeted linears.
    ranks : RankPlan
    fixed : mapping of str to int
        Ranks that may not be shared out anew.
    recipe : CompressionRecipe
    streams : Streams
        In front of the first block.
    options : CompressionOptions
    clock : Clock
    state : RunState, optional
        Keeps each finished block on disk. Those it holds already are taken from it: both streams
        only pass through them.
    statistics : Statistics, optional
        What else the method and the refinement look at.

    Raises
    ------
    NumericalError
        If a weight or an activation is not finite, or a moment does not fit its tokens.
    CheckpointError
        If the state is damaged, or the disk is full.

    References
    ----------
    AA-SVD (arXiv 2604.02119), algorithm 2.
    """
    walk = Walk(ranks, {site.name: dense_report(site) for site in anatomy.sites})
    factored = anatomy.only(name for name, rank in ranks.ranks.items() if rank is not None)
    is_looking_ahead = recipe.refines and recipe.refine.loss == "kl"
    if is_looking_ahead:
        with clock.phase("predictions"):
            keep_final(model, anatomy, streams)
    for index in options.track(range(len(factored.groups)), "compressing"):
        path = f"{anatomy.path}.{index}"
        if state is not None and index < len(state.finished):
            with clock.phase("resume"), staying(model.get_submodule(path)):
                resume_block(model, index, path, state, streams, walk)
            let_go(model.get_submodule(path))
            continue
        block = BlockInTurn(
            model,
            index,
            path,
            factored.groups[index],
            recipe,
            streams,
            walk,
            Clock(),
            statistics,
            RestOfModel(model, anatomy, streams, index) if is_looking_ahead else None,
        )
        with gathered_warnings() as messages, staying(model.get_submodule(path)):
            block.compress(fixed)
        for phase, seconds in block.clock.seconds.items():
            clock.seconds[phase] = clock.seconds.get(phase, 0.0) + seconds
        reports = [walk.linears[site.name] for site in block.sites]
        keep_block(state, model, index, path, reports, clock, walk.blocks[-1], messages)
        let_go(model.get_submodule(path))
        step_forward(streams)
    return walk
