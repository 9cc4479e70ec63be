"""A block that is finished: from disk into the model, and both streams past it."""

import copy
from typing import Any

from slimrank.allocation import RankPlan
from slimrank.calibration import BlockPair, Streams, pass_original, pass_shifted, step_forward
from slimrank.checkpoint import RunState
from slimrank.errors import CheckpointError
from slimrank.keeping import fill_block
from slimrank.sequential.walked import Walk


def resume_block(
    model: Any, index: int, path: str, state: RunState, streams: Streams, walk: Walk
) -> None:
    """Take a finished block from disk, and both streams through it.

    Parameters
    ----------
    model : PreTrainedModel
        The block is changed in it.
    index : int
    path : str
        Dotted name of the block.
    state : RunState
    streams : Streams
        In front of the block; behind it afterwards.
    walk : Walk
        Gets the reports and ranks of the block.

    Raises
    ------
    CheckpointError
        If the file is damaged, or does not fit the model.

    Warns
    -----
    NumericalWarning
        What was warned of when the block was made.
    """
    module = model.get_submodule(path)
    pair = BlockPair(index, path, copy.deepcopy(module), module)
    pass_original(pair, (), frozenset(), streams)
    finished = fill_block(state, model, index, path)
    if finished.block is None:
        raise CheckpointError(f"block {index} in {state.folder} is of a run in one-shot order")
    pass_shifted(pair, (), streams)
    walk.linears |= {report.name: report for report in finished.linears}
    walk.ranks = RankPlan({**walk.ranks.ranks, **{r.name: r.rank for r in finished.linears}})
    walk.blocks.append(finished.block)
    step_forward(streams)
