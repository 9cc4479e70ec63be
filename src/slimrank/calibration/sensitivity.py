"""How much of an error at a linear's outputs arrives at the outputs of its block."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimrank.calibration.replay import Call, call_block
from slimrank.errors import NumericalError
from slimrank.linalg import in_float64
from slimrank.model import device_of


def output_sensitivity(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    inputs: Float[Tensor, "batch length hidden"],
    call: Call,
    generator: torch.Generator,
    probes: int = 4,
    row: tuple[int, int] | None = None,
) -> dict[str, float]:
    r"""Mean gain from the outputs of linears to the output of their block, to first order.

    With J the Jacobian from a linear's outputs, of all tokens, to the block's output, it is

    .. math:: g = \frac{\lVert J \rVert_F^2}{\text{tokens} \cdot \text{out}}

    so that white errors with mean square ``E‖δy‖²`` a token at the linear make an error of about
    ``g E‖δy‖²`` a token at the block's output. The norm is estimated without forming J: for v
    standard normal ``E ‖Jᵀ v‖² = ‖J‖_F²``, and ``Jᵀ v`` is one backward pass for all linears.

    Tokens are those of the block. A linear that sees only some of them, such as an expert, has a
    gain that is smaller by its share, as its errors are means over the tokens that it sees.

    Parameters
    ----------
    block : nn.Module
        On one device, in evaluation mode. One forward and `probes` backward passes; its graph is
        held meanwhile, so `inputs` should be a small batch.
    linears : mapping of str to nn.Module
        Modules within the block, by the names to answer with.
    inputs : Tensor of shape (batch, length, hidden)
        Hidden states in front of the block, on any device.
    call : tuple
        The arguments beside the hidden states (see `Batch`).
    generator : torch.Generator
        On the CPU, where v is drawn in float32, so that all devices see the same one.
    probes : int
        How many v. On J of many equal singular values the relative standard error is about
        ``(2 / (probes · rank J))^{1/2}``.
    row : (int, int), optional
        The one sequence of `inputs` is this row of a batch of so many: v is the row of the batch's,
        and the mean of all rows' gains is that of the batch, whoever takes which row.

    Returns
    -------
    dict of str to float
        In order of `linears`; 0.0 for one that was not run, or whose outputs go nowhere.

    Raises
    ------
    NumericalError
        If a gain is not finite, with the linear's name.
    ValueError
        If `probes` is below 1.

    Notes
    -----
    In neither paper: it supplies the weights of `slimrank.allocation.greedy`. The nearer choice,
    the gradient of the block's own error by each linear's outputs, is zero at the first block,
    where original and shifted inputs agree and nothing is compressed yet. The gain does not depend
    on an error being there.

    Differentiation is in the block's dtype and sums are in float64. Neither parameters nor hooks
    of the block are changed, and an outer ``no_grad`` may be on.

    References
    ----------
    Hutchinson (1990), the estimate of a trace.

    Examples
    --------
    Errors of the first linear are doubled by the second, those of the second stay as they are; as
    v is drawn, the figures are near 4 and 1, and their ratio is exact here.

    >>> block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> _ = block[1].weight.data.copy_(2 * torch.eye(3))
    >>> gains = output_sensitivity(
    ...     block, {"a": block[0], "b": block[1]}, torch.ones(1, 5, 3), ((), {}), torch.Generator()
    ... )
    >>> gains["a"] / gains["b"]
    4.0
    """
    if probes < 1:
        raise ValueError(f"at least one probe is needed, not {probes}")
    device = device_of(block)
    with torch.enable_grad(), watched(linears) as edges:
        states = inputs.detach().to(device).requires_grad_()
        outputs = call_block(block, states, call)
    squares = dict.fromkeys(linears, 0.0)
    owners = [name for name, found in edges.items() for _ in found]
    sources = [edge for found in edges.values() for edge, _ in found]
    for _ in range(probes if sources else 0):
        place, size = row or (0, len(outputs))
        whole = torch.randn(size, *outputs.shape[1:], generator=generator)
        probe = whole[place : place + len(outputs)].to(outputs)
        pulled = torch.autograd.grad(outputs, sources, probe, retain_graph=True, allow_unused=True)
        for name, gradient in zip(owners, pulled, strict=True):
            if gradient is not None:
                squares[name] += float(in_float64(gradient).square().sum())
    tokens = inputs.shape[0] * inputs.shape[1]
    gains = {
        name: squares[name] / (probes * tokens * found[0][1]) if found else 0.0
        for name, found in edges.items()
    }
    for name, gain in gains.items():
        if not math.isfinite(gain):
            raise NumericalError(
                f"{name}: the gain from its outputs to those of its block is not finite; the model "
                "has weights or activations that are not, or gradients too large for its dtype"
            )
    return gains


@contextmanager
def watched(
    linears: Mapping[str, nn.Module],
) -> Iterator[dict[str, list[tuple[GradientEdge, int]]]]:
    """Write down where in the graph each output stands, and its width; remove the hooks again.

    The block goes on with a copy. It may change that in place, which would move the outputs
    themselves to another place in the graph.
    """
    edges: dict[str, list[tuple[GradientEdge, int]]] = {name: [] for name in linears}
    with ExitStack() as stack:
        for name, linear in linears.items():
            hook = linear.register_forward_hook(_writing_to(edges[name]))
            stack.callback(hook.remove)
        yield edges


def _writing_to(edges: list[tuple[GradientEdge, int]]) -> Callable[..., Tensor]:
    def hook(_m: nn.Module, _args: object, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        edges.append((get_gradient_edge(output), output.shape[-1]))
        return output.clone()

    return hook
