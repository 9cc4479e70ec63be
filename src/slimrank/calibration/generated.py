"""Sequences that the model writes itself: more tokens to calibrate on, without more text.

They are of the whole of what the model knows, where a short text is of one kind. So they keep what
that text does not speak of, and are as good to train on: the original says what to predict there.
"""

from typing import Any

import torch
from torch import Tensor

from slimrank.calibration.windows import TokenWindows, default_batch_size
from slimrank.errors import ModelError
from slimrank.options import Track

PROMPT = 16


@torch.no_grad()
def generate_windows(
    model: Any,
    text: TokenWindows,
    count: int,
    seed: int,
    batch_size: int | None = None,
    track: Track = lambda steps, _what: steps,
) -> TokenWindows:
    """Let a model go on from random places of a text, by its plain distribution.

    Each sequence begins with 16 tokens of the text (or half of a shorter window), and is as long as
    the text's longest window. Of the model's own generation settings only `eos_token_id` counts:
    tokens that end a text are never drawn, so that no sequence ends early. Nothing else is cut off
    the distribution.

    Parameters
    ----------
    model : PreTrainedModel
    text : TokenWindows
    count : int
        How many sequences.
    seed : int
    batch_size : int, optional
        Sequences at once in a forward, about 4,096 tokens if left out; as one token each is run
        here, four times as many are written at once.
    track : callable
        Wraps the numbers of the batches, and shows how far they are.

    Raises
    ------
    ModelError
        If the model cannot, with its own words.

    References
    ----------
    LLM-QAT (arXiv 2305.17888), section 2.1; Williams et al., "Self-calibration for language model
    quantization and pruning" (arXiv 2410.17170).

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16,
    ...     num_hidden_layers=1, num_attention_heads=2))
    >>> text = TokenWindows((torch.arange(24), torch.arange(24)))
    >>> [len(window) for window in generate_windows(model, text, 3, seed=0).windows]
    [24, 24, 24]
    """
    length = max(len(window) for window in text.windows)
    size = 4 * (batch_size or default_batch_size(length))
    device = next(model.parameters()).device
    prompts = _prompts(text, count, torch.Generator().manual_seed(seed))
    draws = _Draws(torch.Generator(device).manual_seed(seed))
    written: list[Tensor] = []
    batches = torch.split(prompts, size)
    for number in track(range(len(batches)), "writing"):
        batch = batches[number]
        written.extend(_continued(model, batch.to(device), length, draws).cpu())
    return TokenWindows(tuple(written))


def _prompts(text: TokenWindows, count: int, generator: torch.Generator) -> Tensor:
    """Pieces of random windows, all of one length."""
    length = min(PROMPT, max(1, min(len(window) for window in text.windows) // 2))
    pieces = []
    for choice in torch.randint(len(text.windows), (count,), generator=generator).tolist():
        window = text.windows[choice]
        start = int(torch.randint(len(window) - length + 1, (), generator=generator))
        pieces.append(window[start : start + length])
    return torch.stack(pieces)


class _Draws:
    """Make the largest score a draw from the distribution (Gumbel noise), by its own generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ModelError(f"a prediction after {input_ids.shape[1]} tokens is NaN")
        scores = scores.float()
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


def _continued(model: Any, prompts: Tensor, length: int, draws: _Draws) -> Tensor:
    """Prompts and what the model says after them."""
    from transformers import GenerationConfig, LogitsProcessorList

    missing = length - prompts.shape[1]
    if missing == 0:
        return prompts
    # transformers takes what these leave open from the model's own: it is lent these meanwhile
    if not (hasattr(model, "generate") and hasattr(model, "generation_config")):
        raise ModelError(
            f"{type(model).__name__} cannot write sequences of its own (it has no method "
            "generate); leave --generate out"
        )
    own = model.generation_config
    settings = GenerationConfig(
        do_sample=False,  # what is largest is a draw already
        eos_token_id=own.eos_token_id,
        pad_token_id=0,
        min_new_tokens=missing,
        max_new_tokens=missing,
        use_cache=True,
    )
    model.generation_config = settings
    try:
        found: Tensor = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=settings,
            logits_processor=LogitsProcessorList([draws]),
        )
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot write sequences of its own ({error}); leave --generate "
            "out"
        ) from error
    finally:
        model.generation_config = own
    return found
