"""What a walk over the blocks has come to."""

from dataclasses import dataclass, field

from slimrank.allocation import RankPlan
from slimrank.report import BlockReport, LinearReport


@dataclass(slots=True)
class Walk:
    """What a walk over the blocks has come to.

    Parameters
    ----------
    ranks : RankPlan
        As built; shared out anew within each block if the recipe says so.
    linears : dict of str to LinearReport
        Of all targeted linears, in call order.
    blocks : list of BlockReport
    """

    ranks: RankPlan
    linears: dict[str, LinearReport]
    blocks: list[BlockReport] = field(default_factory=list)
