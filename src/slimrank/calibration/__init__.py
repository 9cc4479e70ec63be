"""Text to activations to moments."""

from slimrank.calibration.backward import loss_scale
from slimrank.calibration.generated import generate_windows
from slimrank.calibration.gradient_sums import BlockGradients
from slimrank.calibration.gradients import (
    MEAN_GRADIENT,
    METRIC,
    OUTPUT_METRIC,
    ROW_WEIGHTS,
    collect_gradients,
    keep_gradients,
)
from slimrank.calibration.head import head_logits
from slimrank.calibration.importance import BlockInfluence
from slimrank.calibration.joint import own_windows
from slimrank.calibration.levels import call_levels
from slimrank.calibration.lockstep import (
    ARRIVED,
    INPUT,
    TARGET,
    BlockPair,
    OriginalPass,
    pass_original,
    step_forward,
)
from slimrank.calibration.magnitudes import collect_magnitudes
from slimrank.calibration.moments import BlockMoments, LastInputs, check_on_tokens, collect_moments
from slimrank.calibration.replay import (
    Batch,
    Batches,
    after_blocks,
    blocks_of,
    call_block,
    check_replay,
    embed_batches,
    record_calls,
    run_block,
)
from slimrank.calibration.rest import FINAL, RestOfModel, call_checkpointed, keep_final
from slimrank.calibration.sensitivity import output_sensitivity
from slimrank.calibration.shifted import pass_level, pass_shifted
from slimrank.calibration.store import ActivationStore, stacked, together
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams, embed_streams
from slimrank.calibration.sums import GroupSums
from slimrank.calibration.text import packaged_text, read_text
from slimrank.calibration.token_check import gap_on_tokens
from slimrank.calibration.windows import (
    TokenWindows,
    default_batch_size,
    draw_windows,
    from_padded,
    hold_out,
)

__all__ = [
    "ARRIVED",
    "FINAL",
    "INPUT",
    "MEAN_GRADIENT",
    "METRIC",
    "ORIGINAL",
    "OUTPUT_METRIC",
    "ROW_WEIGHTS",
    "SHIFTED",
    "TARGET",
    "ActivationStore",
    "Batch",
    "Batches",
    "BlockGradients",
    "BlockInfluence",
    "BlockMoments",
    "BlockPair",
    "GroupSums",
    "LastInputs",
    "OriginalPass",
    "RestOfModel",
    "Streams",
    "TokenWindows",
    "after_blocks",
    "blocks_of",
    "call_block",
    "call_checkpointed",
    "call_levels",
    "check_on_tokens",
    "check_replay",
    "collect_gradients",
    "collect_magnitudes",
    "collect_moments",
    "default_batch_size",
    "draw_windows",
    "embed_batches",
    "embed_streams",
    "from_padded",
    "gap_on_tokens",
    "generate_windows",
    "head_logits",
    "hold_out",
    "keep_final",
    "keep_gradients",
    "loss_scale",
    "output_sensitivity",
    "own_windows",
    "packaged_text",
    "pass_level",
    "pass_original",
    "pass_shifted",
    "read_text",
    "record_calls",
    "run_block",
    "stacked",
    "step_forward",
    "together",
]
