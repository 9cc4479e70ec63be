"""How far the whole model's predictions are from the original's, by what one block gives."""

from collections.abc import Iterator, Sequence
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
        with reduced_precision(batch.inputs):
            hidden = call_block(block, batch.inputs, batch.call)
        scale = loss_scale(batch.inputs.dtype, 1.0)  # no gradient by a logit is larger
        _multiply_gradient(hidden, 1 / scale)
        given = self.rest.states(hidden, batch.numbers)
        wanted = self.rest.wanted(batch.numbers).to(given.device)
        again = partial(checkpoint, self._part, use_reentrant=False, preserve_rng_state=False)
        parts = [again(given[:, few], wanted[:, few], scale) for few in few_positions(given)]
        return torch.stack(parts).sum(), given.shape[0] * given.shape[1]

    def _part(self, given: Tensor, wanted: Tensor, scale: float) -> Tensor:
        with torch.no_grad():
            aim = predictions(self.rest.logits(wanted))
        logits = _wide(self.rest.logits(given))  # where gradients do not underflow yet
        _multiply_gradient(logits, scale)
        return summed_divergence(predictions(logits), aim)


def few_positions(states: Tensor) -> Iterator[slice]:
    """Cut the positions of (batch, length, …) so that about `TOKENS` are held at once.

    Examples
    --------
    >>> [(few.start, few.stop) for few in few_positions(torch.empty(2, 300, 1))]
    [(0, 128), (128, 256), (256, 384)]
    """
    chunk = max(1, TOKENS // states.shape[0])
    return (slice(start, start + chunk) for start in range(0, states.shape[1], chunk))


def predictions(logits: Tensor) -> Tensor:
    """Logarithms of the probabilities, in float32 or wider."""
    return _wide(logits).log_softmax(-1)


def summed_divergence(found: Tensor, aim: Tensor) -> Tensor:
    """``KL(aim ‖ found)`` of predictions, summed over positions."""
    return nn.functional.kl_div(found, aim, reduction="sum", log_target=True)


def _multiply_gradient(tensor: Tensor, factor: float) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
