"""A transformers model as blocks of linears."""

from slimrank.model.anatomy import (
    Anatomy,
    InputGroup,
    LinearSite,
    block_path,
    discover,
    list_sites,
)
from slimrank.model.surgery import matches, replace_linear, select_targets

__all__ = [
    "Anatomy",
    "InputGroup",
    "LinearSite",
    "block_path",
    "discover",
    "list_sites",
    "matches",
    "replace_linear",
    "select_targets",
]
