"""One block backwards: from the gradient at its output to those at its linears and its input."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from slimrank.calibration.hooks import taking_inputs
from slimrank.calibration.replay import Call, call_block
from slimrank.calibration.sensitivity import watched
from slimrank.model import device_of

HALF_PEAK = 8  # binary exponent of the largest entry of a float16 gradient that enters a block


@dataclass(frozen=True, slots=True)
class Pulled:
    """Gradients of the loss within one block, in float32 or wider.

    Parameters
    ----------
    entering : Tensor of shape (batch, length, hidden)
        By the block's input.
    outputs : dict of str to list of Tensor
        For each linear, by its outputs, each of shape (..., out): one for each time that it ran and
        that the loss depends on.
    inputs : dict of str to list of Tensor
        What the linear received at these times; empty if not asked for.
    """

    entering: Tensor
    outputs: dict[str, list[Tensor]]
    inputs: dict[str, list[Tensor]]


def pull_back(
    block: nn.Module,
    names: Iterable[str],
    inputs: Float[Tensor, "batch length hidden"],
    call: Call,
    gradient: Float[Tensor, "batch length hidden"],
    with_inputs: bool = False,
) -> Pulled:
    """Run a block once more, and take the gradient at its output back through it.

    Parameters
    ----------
    block : nn.Module
        On one device, in evaluation mode. It runs in its own dtype, without autocast; neither its
        parameters nor its own hooks are changed, and an outer ``no_grad`` may be on.
    names : iterable of str
        Of linears within the block.
    inputs : Tensor of shape (batch, length, hidden)
        Hidden states in front of the block, on any device.
    call : tuple
        The arguments beside the hidden states (see `Batch`).
    gradient : Tensor of shape (batch, length, hidden), float32 or wider
        Of the loss by the block's output; finite.
    with_inputs : bool
        Give the inputs of the linears too.

    Returns
    -------
    Pulled
        In bfloat16 models as exact as bfloat16; in float16 scaled meanwhile (see `loss_scale`).

    Examples
    --------
    >>> block = nn.Linear(1, 1, bias=False)
    >>> _ = block.weight.data.fill_(3.0)
    >>> found = pull_back(block, [""], torch.ones(1, 1, 1), ((), {}), torch.ones(1, 1, 1))
    >>> found.entering.item(), found.outputs[""][0].item()
    (3.0, 1.0)
    """
    device = device_of(block)
    linears = {name: block.get_submodule(name) for name in names}
    seen: dict[str, list[Tensor]] = {name: [] for name in linears} if with_inputs else {}
    takers = {name: partial(_keep, kept) for name, kept in seen.items()}
    with torch.enable_grad(), watched(linears) as edges, taking_inputs(block, takers):
        states = inputs.detach().to(device).requires_grad_().clone()  # may be changed in place
        entrance = get_gradient_edge(states)
        outputs = call_block(block, states, call)
    sources = [entrance, *(edge for found in edges.values() for edge, _ in found)]
    scale = loss_scale(outputs.dtype, float(gradient.abs().max()))
    scaled = (gradient.to(device) * scale).to(outputs)
    first, *pulled = torch.autograd.grad(outputs, sources, scaled, allow_unused=True)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    result = Pulled(
        first.to(wide) / scale, {name: [] for name in linears}, {name: [] for name in seen}
    )
    places = [(name, time) for name, found in edges.items() for time in range(len(found))]
    for (name, time), found in zip(places, pulled, strict=True):
        if found is not None:
            result.outputs[name].append(found.to(wide) / scale)
            if with_inputs:
                result.inputs[name].append(seen[name][time])
    return result


def loss_scale(dtype: torch.dtype, peak: float) -> float:
    """Power of two to multiply gradients by, so that float16 holds them; 1 for other dtypes.

    The largest entry is then just below 2⁸, which leaves a factor of 2⁸ to entries that grow within
    the block, and 2³² down to the smallest that float16 tells from zero. bfloat16 has the range of
    float32 and needs no scale.

    Parameters
    ----------
    dtype : torch.dtype
    peak : float
        Largest absolute value of the gradient.

    Examples
    --------
    >>> loss_scale(torch.float16, 0.75), loss_scale(torch.bfloat16, 0.75)
    (256.0, 1.0)
    """
    if dtype != torch.float16 or peak == 0 or not math.isfinite(peak):
        return 1.0
    return 2.0 ** (HALF_PEAK - math.frexp(peak)[1])


def _keep(kept: list[Tensor], inputs: Tensor) -> None:
    """Copy: the block may go on to change its own in place."""
    kept.append(inputs.detach().clone())
