"""Seconds of a prefill and of new tokens."""

import gc
import time
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import StaticCache

from slimrank.nn import cache_bytes


class Round(NamedTuple):
    """What one model takes, once.

    Attributes
    ----------
    prefill_seconds : float
        For all sequences up to the first new token of each.
    decode_seconds : float
        The median step: one more token of each.
    cache_bytes : int
        After the prefill.
    """

    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


@torch.inference_mode()
def run_once(
    model: Any, batch: int, context: int, new_tokens: int, seed: int = 0, fixed_cache: bool = False
) -> Round:
    """Let a model read random tokens, and write some more, the likeliest each time.

    The head is asked for the last position alone, as in ``generate``.

    Parameters
    ----------
    model : PreTrainedModel
    batch : int
        Sequences at once.
    context : int
        Tokens of each.
    new_tokens : int
        Steps behind the prefill, at least one.
    seed : int
        Of the tokens.
    fixed_cache : bool
        Keys and values have room for all tokens from the beginning, so that no shape changes
        between steps.
    """
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (batch, context), generator=draw).to(device)
    only_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    last = context + new_tokens
    room = StaticCache(config=model.config, max_cache_len=last) if fixed_cache else None
    gc.collect()

    start = _now(device)
    outputs = model(input_ids=ids, past_key_values=room, use_cache=True, **only_last)
    ids = outputs.logits[:, -1:].argmax(-1)
    prefill = _now(device) - start
    cache = outputs.past_key_values
    held = cache_bytes(cache)
    steps = []
    for _ in range(new_tokens):
        start = _now(device)
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True, **only_last)
        ids = outputs.logits[:, -1:].argmax(-1)
        steps.append(_now(device) - start)
    return Round(prefill, median(steps), held)


def _now(device: torch.device) -> float:
    """Time when the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
