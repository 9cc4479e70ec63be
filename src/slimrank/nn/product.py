"""A product with a weight, the way round that is quickest for so many tokens.

Libraries of linear algebra choose their kernels by the order of the factors. On a CPU a product of
a matrix and a vector has a kernel of its own; a few tokens are quicker as columns than as rows.
Everywhere else, and wherever gradients, autocast or a trace would see the difference, it is
``functional.linear``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

HALVES = (torch.bfloat16, torch.float16)
FEW_TOKENS = 32
LARGE = 2**18  # entries of a weight: below, turning the outputs costs what the product saves


def apply_weight(inputs: Tensor, weight: Tensor) -> Tensor:
    """Map ``(..., in)`` by a weight ``(out, in)`` to ``(..., out)``.

    Examples
    --------
    >>> with torch.no_grad():
    ...     apply_weight(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[6.]])
    """
    outputs, width = weight.shape
    if inputs.numel() == width:
        if weight.dtype in HALVES and is_free(inputs, weight):
            return torch.mv(weight, inputs.reshape(-1)).view(*inputs.shape[:-1], outputs)
    elif are_columns(inputs, weight):
        columns = weight @ inputs.reshape(-1, width).t()
        return columns.t().contiguous().view(*inputs.shape[:-1], outputs)
    return functional.linear(inputs, weight)


def are_columns(inputs: Tensor, weight: Tensor) -> bool:
    """Whether tokens are few and the weight is large, so that they are quicker as columns."""
    if inputs.numel() > FEW_TOKENS * weight.shape[1] or weight.numel() < LARGE:
        return False
    return is_free(inputs, weight)


def is_free(inputs: Tensor, weight: Tensor) -> bool:
    """Whether nobody but the CPU could tell how a product is taken."""
    if torch.is_grad_enabled() or not inputs.is_cpu or inputs.dtype != weight.dtype:
        return False
    is_plain = type(inputs) is Tensor and type(weight) in (Tensor, nn.Parameter)
    return is_plain and not (torch.is_autocast_enabled("cpu") or is_recorded())


def is_recorded() -> bool:
    """Whether a graph is made of what happens, to be run for any number of tokens."""
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return is_traced or torch.compiler.is_compiling()
