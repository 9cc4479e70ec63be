"""How far the whole model's predictions are from the original's, by what one block gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimrank.calibration import call_block, loss_scale
from slimrank.refine.data import MicroBatch
from slimrank.refine.losses import reduced_precision

TOKENS = 256  # positions whose logits are held at once


@runtime_checkable
class Rest(Protocol):
    """What stands behind a block in the original model; gradients go through it, not into it."""

    def states(self, hidden: Tensor, numbers: Sequence[int]) -> Tensor:
        """Take a block's outputs through all later blocks: (batch, length, hidden) both.

        `numbers` are those of the sequences (see `MicroBatch`).
        """
        ...

    def wanted(self, numbers: Sequence[int]) -> Tensor:
        """What the original model gives behind its last block for these sequences."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Predictions from states behind the last block, each position by itself."""
        ...


@dataclass(frozen=True, slots=True)
class Divergence:
    """Kullback-Leibler divergence of the predictions, in nats a token.

    ``KL(p ‖ p')`` where p is what the original model predicts at a position, and p' what it
    predicts with the compressed block in it and what really arrives there. Every position counts,
    also the last, which has no next token.

    Logits are made a few positions at a time, and made again for the gradient, so memory does not
    grow with the length of sequences times the vocabulary. The rest runs in the model's own dtype;
    gradients in it are scaled if that is float16.

    Parameters
    ----------
    rest : Rest
    """

    rest: Rest

    @property
    def unit(self) -> float:
        """Nats are reported as they are."""
        return 1.0

    def total(self, block: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        """Sum over tokens, and the number of tokens."""
        with reduced_precision(batch):
            hidden = call_block(block, batch.inputs, batch.call)
        scale = loss_scale(batch.inputs.dtype, 1.0)  # no gradient by a logit is larger
        _multiply_gradient(hidden, 1 / scale)
        given = self.rest.states(hidden, batch.numbers)
        wanted = self.rest.wanted(batch.numbers).to(given.device)
        count, length = given.shape[:2]
        chunk = max(1, TOKENS // count)
        again = partial(checkpoint, self._part, use_reentrant=False, preserve_rng_state=False)
        parts = [
            again(given[:, start : start + chunk], wanted[:, start : start + chunk], scale)
            for start in range(0, length, chunk)
        ]
        return torch.stack(parts).sum(), count * length

    def _part(self, given: Tensor, wanted: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            aim = _wide(self.rest.logits(wanted)).log_softmax(-1)
        logits = _wide(self.rest.logits(given))
        _multiply_gradient(logits, scale)
        found = logits.log_softmax(-1)
        return nn.functional.kl_div(found, aim, reduction="sum", log_target=True)


def _multiply_gradient(tensor: Tensor, factor: float) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
