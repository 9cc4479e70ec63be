"""A transformers model as blocks of linears."""

from slimrank.model.anatomy import (
    Anatomy,
    InputGroup,
    LinearSite,
    block_path,
    discover,
    list_sites,
    outline,
)
from slimrank.model.attention import AttentionSite, find_attention
from slimrank.model.fingerprint import weights_fingerprint
from slimrank.model.mapped import copy_of, is_mapped, let_go_of, map_parameters
from slimrank.model.surgery import matches, replace_linear, select_targets, split_fused
from slimrank.model.turns import device_of, let_go, run_on, staying, take_turns

__all__ = [
    "Anatomy",
    "AttentionSite",
    "InputGroup",
    "LinearSite",
    "block_path",
    "copy_of",
    "device_of",
    "discover",
    "find_attention",
    "is_mapped",
    "let_go",
    "let_go_of",
    "list_sites",
    "map_parameters",
    "matches",
    "outline",
    "replace_linear",
    "run_on",
    "select_targets",
    "split_fused",
    "staying",
    "take_turns",
    "weights_fingerprint",
]
