"""A product with a weight, the way round that is quickest for so many tokens.

Libraries of linear algebra choose their kernels by the order of the factors. On a CPU a product of
a matrix and a vector has a kernel of its own; a few tokens are quicker as columns than as rows.
Everywhere else, and wherever gradients, autocast or a trace would see the difference, it is
``functional.linear``.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HALVES = (torch.bfloat16, torch.float16)
FEW_TOKENS = 32
FEW_FOR_CODES = 8  # beyond, codes are quicker as floats
CPUS = ("AVX512", "AVX2")  # where the kernel for codes was tried
CODES_AT_ONCE = 16  # it reads these at once, from addresses that must be multiples of their bytes
LARGE = 2**18  # entries of a weight: below, turning the outputs costs what the product saves


def apply_weight(inputs: Tensor, weight: Tensor, is_between: bool = False) -> Tensor:
    """Map ``(..., in)`` by a weight ``(out, in)`` to ``(..., out)``.

    Parameters
    ----------
    inputs : Tensor of shape (..., in)
    weight : Tensor of shape (out, in)
    is_between : bool
        Another product follows at once: what came as columns is left so, a view that is not
        contiguous.

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
        found = (weight @ inputs.reshape(-1, width).t()).t()
        return (found if is_between else found.contiguous()).view(*inputs.shape[:-1], outputs)
    return functional.linear(inputs, weight)


def apply_codes(inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Map ``(..., in)`` by codes ``(out, in)``, int8, and a scale for each output.

    Codes are exact in every float dtype, so the scale may come after the product. A few tokens in
    bfloat16 on a CPU take PyTorch's kernel for it, which reads the codes once, as they are.

    Examples
    --------
    >>> codes, scale = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    >>> apply_codes(torch.ones(2), codes, scale)
    tensor([ 1.5000, -2.0000])
    """
    if _is_compiled(inputs):
        found: Tensor = _OPS.apply_codes(inputs, codes, scale)
        return found
    return _codes_applied(inputs, codes, scale)


@torch.library.custom_op("slimrank::apply_codes", mutates_args=())
def _codes_applied_later(inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Choose when a compiled graph runs, since a graph is for any number of tokens."""
    return _codes_applied(inputs, codes, scale)


@_codes_applied_later.register_fake
def _codes_shape(inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    del scale
    return inputs.new_empty((*inputs.shape[:-1], codes.shape[0]))


_OPS: Any = torch.ops.slimrank


def _codes_applied(inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    outputs, width = codes.shape
    if _are_for_kernel(inputs, codes, scale):
        rows = inputs.reshape(-1, width).contiguous()
        if rows.data_ptr() % (2 * CODES_AT_ONCE):
            rows = rows.clone()
        found: Tensor = torch._weight_int8pack_mm(rows, codes, scale)
        return found.view(*inputs.shape[:-1], outputs)
    weight = codes.to(inputs.dtype)
    if inputs.dtype == torch.float16:  # where sums of codes would overflow
        return functional.linear(inputs, weight * scale[:, None])
    return functional.linear(inputs, weight) * scale


def _is_compiled(inputs: Tensor) -> bool:
    """Whether a graph is compiled in which the kernel may be the best choice."""
    is_dynamo = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    may_be = inputs.is_cpu and inputs.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return is_dynamo and may_be


def _are_for_kernel(inputs: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """Whether tokens are few, and the kernel right for such codes on this CPU."""
    width = codes.shape[1]
    if inputs.dtype != torch.bfloat16 or not 0 < inputs.numel() <= FEW_FOR_CODES * width:
        return False
    if not _has_kernel() or not codes.numel() or width % CODES_AT_ONCE:
        return False
    if not is_free(inputs, scale) or torch._C._functorch.is_functorch_wrapped_tensor(inputs):
        return False
    return codes.is_contiguous() and codes.data_ptr() % CODES_AT_ONCE == 0


@cache
def _has_kernel() -> bool:
    is_there = hasattr(torch, "_weight_int8pack_mm")  # it is no part of PyTorch's interface
    return is_there and torch.backends.cpu.get_cpu_capability() in CPUS


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
