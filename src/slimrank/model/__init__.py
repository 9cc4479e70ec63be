"""A transformers model as blocks of linears."""

from slimrank.model.anatomy import (
    Anatomy,
    InputGroup,
    LinearSite,
    block_path,
    discover,
    list_sites,
)
from slimrank.model.attention import AttentionSite, find_attention
from slimrank.model.fingerprint import weights_fingerprint
from slimrank.model.surgery import matches, replace_linear, select_targets, split_fused

__all__ = [
    "Anatomy",
    "AttentionSite",
    "InputGroup",
    "LinearSite",
    "block_path",
    "discover",
    "find_attention",
    "list_sites",
    "matches",
    "replace_linear",
    "select_targets",
    "split_fused",
    "weights_fingerprint",
]
