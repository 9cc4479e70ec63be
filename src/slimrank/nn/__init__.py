"""Modules that run."""

from slimrank.nn.latent_cache import (
    attach_latent_cache,
    cache_bytes,
    detach_latent_cache,
    latent_bytes,
)
from slimrank.nn.low_rank_linear import LowRankLinear
from slimrank.nn.split_linear import SplitLinear

__all__ = [
    "LowRankLinear",
    "SplitLinear",
    "attach_latent_cache",
    "cache_bytes",
    "detach_latent_cache",
    "latent_bytes",
]
