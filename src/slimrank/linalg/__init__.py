"""Second moments, solves and spectra: tensors in, tensors out."""

from slimrank.linalg.anchored import anchored_loss, decompose_anchored
from slimrank.linalg.drift import DriftAccumulator
from slimrank.linalg.lowrank import (
    Decomposition,
    Factors,
    decompose_outputs,
    decompose_whitened,
    output_loss,
)
from slimrank.linalg.moments import MomentAccumulator, Moments
from slimrank.linalg.psd import cholesky_with_jitter, divide, symmetric_root, symmetrize
from slimrank.linalg.signs import fix_signs
from slimrank.linalg.spectrum import (
    break_even_rank,
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
    "anchored_loss",
    "break_even_rank",
    "cholesky_with_jitter",
    "decompose_anchored",
    "decompose_outputs",
    "decompose_whitened",
    "divide",
    "effective_rank",
    "fix_signs",
    "normalized_effective_rank",
    "output_loss",
    "rank_for_energy",
    "symmetric_root",
    "symmetrize",
    "tail_energy",
]
