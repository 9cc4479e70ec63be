"""Training of a compressed block towards what the original block gave."""

from slimrank.refine.block import refine_block
from slimrank.refine.data import BlockData, MicroBatch
from slimrank.refine.divergence import Rest, few_positions, predictions, summed_divergence
from slimrank.refine.losses import reduced_precision
from slimrank.refine.masters import Best, master_parameters, set_values
from slimrank.refine.steps import Steps, learning_rate, seed_of

__all__ = [
    "Best",
    "BlockData",
    "MicroBatch",
    "Rest",
    "Steps",
    "few_positions",
    "learning_rate",
    "master_parameters",
    "predictions",
    "reduced_precision",
    "refine_block",
    "seed_of",
    "set_values",
    "summed_divergence",
]
