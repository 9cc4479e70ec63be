"""Second moments, solves and spectra: tensors in, tensors out."""

from slimrank.linalg.anchored import anchored_loss, anchored_target, decompose_anchored
from slimrank.linalg.drift import DriftAccumulator
from slimrank.linalg.exact import float64_device, in_float64
from slimrank.linalg.first_order import predicted_changes
from slimrank.linalg.lowrank import (
    Decomposition,
    Factors,
    decompose_outputs,
    decompose_whitened,
    output_loss,
)
from slimrank.linalg.metric import damped, decompose_in_metric
from slimrank.linalg.moments import MomentAccumulator, Moments
from slimrank.linalg.pivot import PivotedFactors, other_rows, pivot_rows
from slimrank.linalg.psd import cholesky_with_jitter, divide, symmetric_root, symmetrize
from slimrank.linalg.remapping import Remapped, remap, remapped_bytes
from slimrank.linalg.rounding import (
    RoundedRows,
    even_columns,
    principal_components,
    round_rows,
    rounding_loss,
)
from slimrank.linalg.signs import fix_signs
from slimrank.linalg.spectrum import (
    effective_rank,
    normalized_effective_rank,
    rank_for_energy,
    tail_energy,
)

__all__ = [
    "Decomposition",
    "DriftAccumulator",
    "Factors",
    "MomentAccumulator",
    "Moments",
    "PivotedFactors",
    "Remapped",
    "RoundedRows",
    "anchored_loss",
    "anchored_target",
    "cholesky_with_jitter",
    "damped",
    "decompose_anchored",
    "decompose_in_metric",
    "decompose_outputs",
    "decompose_whitened",
    "divide",
    "effective_rank",
    "even_columns",
    "fix_signs",
    "float64_device",
    "in_float64",
    "normalized_effective_rank",
    "other_rows",
    "output_loss",
    "pivot_rows",
    "predicted_changes",
    "principal_components",
    "rank_for_energy",
    "remap",
    "remapped_bytes",
    "round_rows",
    "rounding_loss",
    "symmetric_root",
    "symmetrize",
    "tail_energy",
]
