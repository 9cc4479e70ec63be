"""The call of a model that an exporter follows."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from slimrank.targets import probe_ids

INPUTS = ("input_ids", "attention_mask", "position_ids")
PAST, NEW = 3, 4  # tokens in the cache and after it; sizes of 0 and 1 would be taken for constants


class TracedCall:
    """The call of a model that is traced: a few tokens, after a few in the cache.

    Parameters
    ----------
    model : PreTrainedModel

    Attributes
    ----------
    inputs : dict
        Arguments by name; the cache keeps all tokens, also of attention with a window, whose mask
        hides those that have left it.
    shapes : dict
        Which of their axes are free.
    """

    def __init__(self, model: Any) -> None:
        cache = DynamicCache()
        tokens = probe_ids(model, 2 * (PAST + NEW)).reshape(2, -1)
        model(input_ids=tokens[:, :PAST], past_key_values=cache, use_cache=True)
        every: dict[str, Tensor] = {
            "input_ids": tokens[:, PAST:].contiguous(),
            "attention_mask": torch.ones_like(tokens),
            "position_ids": torch.arange(PAST, PAST + NEW).repeat(2, 1),
        }
        names, free = accepted_inputs(model), torch.export.Dim.AUTO
        self.inputs: dict[str, Any] = {name: every[name] for name in names}
        self.inputs["past_key_values"] = cache
        self.shapes: dict[str, Any] = {name: {0: free, 1: free} for name in names}
        self.shapes["past_key_values"] = [{0: free, 2: free}] * (2 * len(cache.layers))


def accepted_inputs(model: Any) -> tuple[str, ...]:
    """Which of the inputs that graphs have the model takes."""
    names = inspect.signature(model.forward).parameters
    return tuple(name for name in INPUTS if name in names)
