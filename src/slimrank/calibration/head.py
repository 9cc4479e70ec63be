"""From the last block's output to the loss, by the model's own code, and the gradient back."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimrank.calibration.backward import loss_scale
from slimrank.calibration.replay import blocks_of, passing_through
from slimrank.errors import NumericalError
from slimrank.model import Anatomy

CHUNK = 256  # positions whose logits are held at once


def head_logits(
    model: nn.Module, anatomy: Anatomy, states: Float[Tensor, "batch length hidden"]
) -> Float[Tensor, "batch length vocabulary"]:
    """What the model predicts from states behind its last block, which each position has alone.

    Parameters
    ----------
    model : nn.Module
        A causal language model; run with every block giving these states.
    anatomy : Anatomy
    states : Tensor of shape (batch, length, hidden)
        On the model's first device. Gradients go through to them.

    Returns
    -------
    Tensor of shape (batch, length, vocabulary)
    """
    ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
    with passing_through(blocks_of(model, anatomy), anatomy.extra_outputs, [], [], states):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def head_gradient(
    model: nn.Module,
    anatomy: Anatomy,
    hidden: Float[Tensor, "length hidden"],
    labels: Callable[[int, Tensor], Tensor],
) -> Float[Tensor, "length hidden"]:
    """Gradient of one window's summed cross-entropy by the last block's output.

    The model is run with every block giving these states, a few positions at a time. So final
    norms, the scaling and capping of logits, and whatever stands behind the blocks are the model's
    own. All of that looks at one position at a time.

    Parameters
    ----------
    model : nn.Module
        A causal language model in evaluation mode; its parameters are left alone.
    anatomy : Anatomy
    hidden : Tensor of shape (length, hidden)
        Behind the last block.
    labels : callable
        From the first position and logits of shape (tokens, vocabulary) to the labels there.

    Returns
    -------
    Tensor of shape (length, hidden), float32 or wider
        On the CPU. The last position predicts nothing: its gradient is zero.

    Raises
    ------
    NumericalError
        If the loss is not finite.
    """
    found = torch.zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(hidden) - 1, CHUNK):
        stop = min(start + CHUNK, len(hidden) - 1)
        found[start:stop] = _chunk_gradient(model, anatomy, hidden[start:stop], start, labels)
    return found


def _chunk_gradient(
    model: nn.Module,
    anatomy: Anatomy,
    hidden: Tensor,
    start: int,
    labels: Callable[[int, Tensor], Tensor],
) -> Tensor:
    device = next(model.parameters()).device
    with torch.enable_grad():
        states = hidden[None].detach().to(device).requires_grad_()
        logits = head_logits(model, anatomy, states)[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = labels(start, logits.detach())
        loss = nn.functional.cross_entropy(logits, chosen, reduction="sum")
    size = float(loss.detach())
    if not math.isfinite(size):
        raise NumericalError(
            f"the loss of a calibration window is {size}; the model or its dtype is broken"
        )
    scale = loss_scale(states.dtype, 1.0)  # no entry of the gradient by logits is larger
    (gradient,) = torch.autograd.grad(loss, states, torch.full_like(loss, scale))
    return gradient[0].cpu().to(torch.promote_types(gradient.dtype, torch.float32)) / scale
