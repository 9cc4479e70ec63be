"""Text to activations to moments."""

from slimrank.calibration.importance import BlockInfluence
from slimrank.calibration.lockstep import (
    ARRIVED,
    INPUT,
    TARGET,
    BlockPair,
    OriginalPass,
    call_levels,
    pass_level,
    pass_original,
    pass_shifted,
    step_forward,
)
from slimrank.calibration.moments import TOKEN_CHECK, BlockMoments, check_on_tokens, collect_moments
from slimrank.calibration.replay import Batch, after_blocks, embed_batches, run_block
from slimrank.calibration.sensitivity import output_sensitivity
from slimrank.calibration.store import ActivationStore, stacked
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams, embed_streams
from slimrank.calibration.sums import GroupSums
from slimrank.calibration.text import packaged_text, read_text
from slimrank.calibration.windows import (
    TokenWindows,
    default_batch_size,
    draw_windows,
    from_padded,
    hold_out,
)

__all__ = [
    "ARRIVED",
    "INPUT",
    "ORIGINAL",
    "SHIFTED",
    "TARGET",
    "TOKEN_CHECK",
    "ActivationStore",
    "Batch",
    "BlockInfluence",
    "BlockMoments",
    "BlockPair",
    "GroupSums",
    "OriginalPass",
    "Streams",
    "TokenWindows",
    "after_blocks",
    "call_levels",
    "check_on_tokens",
    "collect_moments",
    "default_batch_size",
    "draw_windows",
    "embed_batches",
    "embed_streams",
    "from_padded",
    "hold_out",
    "output_sensitivity",
    "packaged_text",
    "pass_level",
    "pass_original",
    "pass_shifted",
    "read_text",
    "run_block",
    "stacked",
    "step_forward",
]
