"""Modules that run."""

from slimrank.nn.int8_linear import (
    Int8Factor,
    Int8Linear,
    check_codes,
    check_scale,
    empty_int8_factors,
    has_int8_factors,
    round_factors,
)
from slimrank.nn.latent_cache import (
    attach_latent_cache,
    cache_bytes,
    detach_latent_cache,
    latent_bytes,
)
from slimrank.nn.low_rank_linear import LowRankLinear
from slimrank.nn.remapped_factors import (
    RemappedFactor,
    RemappedFactors,
    empty_remapped_factors,
    packed_factors,
    remap_factors,
)
from slimrank.nn.row_placement import check_pivots, copy_rows
from slimrank.nn.split_linear import SplitLinear

__all__ = [
    "Int8Factor",
    "Int8Linear",
    "LowRankLinear",
    "RemappedFactor",
    "RemappedFactors",
    "SplitLinear",
    "attach_latent_cache",
    "cache_bytes",
    "check_codes",
    "check_pivots",
    "check_scale",
    "copy_rows",
    "detach_latent_cache",
    "empty_int8_factors",
    "empty_remapped_factors",
    "has_int8_factors",
    "latent_bytes",
    "packed_factors",
    "remap_factors",
    "round_factors",
]
