"""A model as its blocks and what stands behind them: states first, predictions a few at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimrank.calibration import (
    blocks_of,
    call_checkpointed,
    check_replay,
    head_logits,
    record_calls,
)
from slimrank.model import Anatomy, outline
from slimrank.refine import predictions

PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Predictor:
    """A dense or compressed model, run block by block by its own code.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode.
    anatomy : Anatomy
        Of its blocks; groups are not looked at.
    """

    model: Any
    anatomy: Anatomy

    @classmethod
    def of(cls, model: Any, ids: Int[Tensor, " tokens"], blocks: str | None = None) -> "Predictor":
        """Find the blocks, and see that one after the other gives what the model gives.

        Parameters
        ----------
        model : PreTrainedModel
        ids : Tensor of shape (tokens,)
            The first few are run.
        blocks : str, optional
            Dotted name of the block list, where it cannot be told.

        Raises
        ------
        ModelError
            If the blocks are not found, or more than hidden states flows from one to the next.
        """
        probe = ids[None, :PROBE_TOKENS].to(next(model.parameters()).device)
        anatomy = outline(model, probe, blocks)
        check_replay(model, anatomy, probe)
        return cls(model, anatomy)

    def states(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        """Behind the last block. Each block is run again for its gradient: one graph is held."""
        hidden, calls = record_calls(self.model, self.anatomy, ids)
        for block, call in zip(blocks_of(self.model, self.anatomy), calls, strict=True):
            hidden = call_checkpointed(block, hidden, call)
        return hidden

    def predictions(
        self, states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logarithms of the probabilities, in float32 or wider, each position by itself."""
        return predictions(head_logits(self.model, self.anatomy, states))

    @torch.no_grad()
    def vocabulary(self) -> int:
        """How many tokens it tells apart."""
        return self.predictions(self.first_states()).shape[-1]

    def first_states(self) -> Float[Tensor, "1 1 hidden"]:
        """Hidden states of one token, in front of the blocks."""
        device = next(self.model.parameters()).device
        ids = torch.zeros(1, 1, dtype=torch.int64)
        return record_calls(self.model, self.anatomy, ids)[0].to(device)
