"""Which parameters are trained: those of the factorised linears, and norms."""

import torch
from torch import Tensor, nn

from slimrank.healing.predictor import Predictor
from slimrank.nn import LowRankLinear


def trained_parameters(student: Predictor) -> list[nn.Parameter]:
    """Both factors and the bias of every factorised linear; norms in the blocks and behind them.

    A norm is a module whose own parameters are all vectors. Dense linears, embeddings, the head and
    what stands in front of the blocks are left as they are: they are the dense model's own.

    Parameters
    ----------
    student : Predictor

    Returns
    -------
    list of nn.Parameter
        In the model's order, none of them empty; empty itself if nothing is factorised.
    """
    inside = f"{student.anatomy.path}."
    found: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    is_factorised = False
    for name, module in student.model.named_modules():
        if isinstance(module, LowRankLinear):
            is_factorised = True
            found += module.parameters()
            continue
        own = list(module.parameters(recurse=False))
        if all(parameter.ndim == 1 for parameter in own):
            (found if name.startswith(inside) else outside).extend(own)
    found += _behind(student, outside)
    return [parameter for parameter in found if parameter.numel()] if is_factorised else []


def _behind(student: Predictor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that predictions from the states behind the last block depend on."""
    if not parameters:
        return []
    with torch.enable_grad():
        total = student.predictions(student.first_states()).sum()
        found: tuple[Tensor | None, ...] = torch.autograd.grad(total, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]
