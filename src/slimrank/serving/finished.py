"""What an engine calls for the linears that it computes as one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimrank.nn import copy_rows


class Placing(NamedTuple):
    """Where outputs stand that are latents, and all others; int64.

    Attributes
    ----------
    latents : Tensor or None
        Which latents are outputs here; None if all are, in their order.
    rows : Tensor
        Where those stand.
    others : Tensor
        Where all that the second products give stands.
    """

    latents: Tensor | None
    rows: Tensor
    others: Tensor


class BareLinear(nn.Module):
    """One product with a weight ``(out, in)``, of which there may be no rows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return functional.linear(inputs, self.weight)


class FinishedLinear(nn.Module):
    """Outputs of all members, side by side.

    Parameters
    ----------
    latents : sequence of nn.Module
        What makes all latents, one product for those in floats and one for those in eight bits.
    expansions : sequence of nn.Module
        For each member what makes its outputs: from its latents, or from the inputs if it is dense.
    columns : sequence of (int, int) or None
        Where a member's latents begin and end; None of one that is dense.
    placing : Placing or None
        None if no member is pivoted.
    """

    chosen: Tensor | None
    rows: Tensor | None
    others: Tensor | None

    def __init__(
        self,
        latents: Sequence[nn.Module],
        expansions: Sequence[nn.Module],
        columns: Sequence[tuple[int, int] | None],
        placing: Placing | None,
    ) -> None:
        super().__init__()
        self.latents = nn.ModuleList(latents)
        self.expansions = nn.ModuleList(expansions)
        self.columns = tuple(columns)
        for name, numbers in zip(("chosen", "rows", "others"), placing or (None,) * 3, strict=True):
            self.register_buffer(name, numbers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``, without a bias."""
        parts = [latent(inputs) for latent in self.latents]
        latents = _side_by_side(parts) if parts else inputs
        pieces = [
            expand(inputs if at is None else latents[..., at[0] : at[1]])
            for at, expand in zip(self.columns, self.expansions, strict=True)
        ]
        others = _side_by_side(pieces)
        if self.rows is None or self.others is None:
            return others
        if self.chosen is not None:
            latents = latents.index_select(-1, self.chosen)
        return copy_rows(latents, others, self.rows, self.others)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)
