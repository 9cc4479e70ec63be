"""Text to activations to moments."""

from slimrank.calibration.importance import BlockInfluence
from slimrank.calibration.moments import BlockMoments, check_on_tokens, collect_moments
from slimrank.calibration.replay import Batch, after_blocks, embed_batches, run_block
from slimrank.calibration.text import packaged_text, read_text
from slimrank.calibration.windows import (
    TokenWindows,
    default_batch_size,
    draw_windows,
    from_padded,
    hold_out,
)

__all__ = [
    "Batch",
    "BlockInfluence",
    "BlockMoments",
    "TokenWindows",
    "after_blocks",
    "check_on_tokens",
    "collect_moments",
    "default_batch_size",
    "draw_windows",
    "embed_batches",
    "from_padded",
    "hold_out",
    "packaged_text",
    "read_text",
    "run_block",
]
