"""Which linears of a block are solved together."""

import re
from collections.abc import Sequence

from slimrank.model import InputGroup


def call_levels(path: str, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups in call order; those alike but for a number (experts) are one level.

    A linear that the forward of `discover` did not reach is a group of its own, in the level of the
    like linears that were reached.

    Parameters
    ----------
    path : str
        Dotted name of the block.
    groups : sequence of InputGroup

    Examples
    --------
    >>> call_levels("layers.0", [])
    []
    """
    levels: dict[frozenset[str], list[InputGroup]] = {}
    for group in groups:
        kind = frozenset(
            re.sub(r"\b\d+\b", "*", site.name.removeprefix(path)) for site in group.sites
        )
        home = next((known for known in levels if kind <= known), kind)
        levels.setdefault(home, []).append(group)
    return list(levels.values())
