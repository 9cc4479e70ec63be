"""Linears as a graph can hold them: constants where ours ask what their tensors are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimrank.errors import ModelError
from slimrank.model import replace_linear
from slimrank.nn import Int8Factor, Int8Linear, LowRankLinear, detach_latent_cache, packed_factors


class PlacedRows(nn.Module):
    """A pivoted `LowRankLinear` whose rows are placed by one gather of constant numbers.

    Parameters
    ----------
    layer : LowRankLinear
        In the pivoted layout; its factors are shared.

    Examples
    --------
    >>> layer = LowRankLinear(8, 6, rank=2, pivoted=True)
    >>> inputs = torch.ones(3, 8)
    >>> bool((PlacedRows(layer)(inputs) == layer(inputs)).all())
    True
    """

    order: Tensor

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.latent, self.expand, self.bias = layer.latent, layer.expand, layer.bias
        self.register_buffer("order", layer.row_numbers().order.flatten().to(torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        latents = self.latent(inputs)
        outputs = torch.cat((latents, self.expand(latents)), -1).index_select(-1, self.order)
        return outputs if self.bias is None else outputs + self.bias


class Decoded(nn.Module):
    """A matrix in int8 codes that becomes floats before its product.

    Engines know a constant in eight bits that is converted, scaled and multiplied by as a weight in
    eight bits. They do not where the scale comes after the product.

    Parameters
    ----------
    coded : Int8Factor or Int8Linear
        Its tensors are shared.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, coded: Int8Factor | Int8Linear) -> None:
        super().__init__()
        self.register_buffer("codes", coded.codes)
        self.register_buffer("scale", coded.scale[:, None])
        self.bias = coded.bias if isinstance(coded, Int8Linear) else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        weight = self.codes.to(inputs.dtype) * self.scale.to(inputs.dtype)
        return F.linear(inputs, weight, self.bias)


def make_traceable(model: Any) -> int:
    """Put what can be traced into the places of our linears, in place; tell how many there were.

    A cache of latents is detached: a graph has the ordinary one, of keys and values.

    Parameters
    ----------
    model : PreTrainedModel

    Raises
    ------
    ModelError
        If factors are packed, which no engine can unpack.
    """
    detach_latent_cache(model)
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            count += 1
            if packed_factors(module) is not None:
                raise ModelError(
                    f"the factors of {name} are packed ('remapped'), which no graph can hold; "
                    "export the folder that was quantised, or quantise it by 'rows'"
                )
            if module.pivoted:
                replace_linear(model, name, PlacedRows(module))
        elif isinstance(module, Int8Linear):
            count += 1
            replace_linear(model, name, Decoded(module))
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Factor):
            replace_linear(model, name, Decoded(module))
    return count
