"""Training of a compressed block towards what the original block gave."""

from slimrank.refine.block import refine_block
from slimrank.refine.data import BlockData, MicroBatch
from slimrank.refine.divergence import Rest
from slimrank.refine.steps import learning_rate

__all__ = ["BlockData", "MicroBatch", "Rest", "learning_rate", "refine_block"]
