"""Tiny models whose keys and values come from linears of low rank, with caches of latents."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimrank.linalg import decompose_outputs
from slimrank.nn import LowRankLinear, SplitLinear, attach_latent_cache


def fused_rows(family: str, config: Any) -> tuple[list[int], list[int]]:
    """Rows of keys and of values in a fused projection, each head after head."""
    heads, width = config.num_attention_heads, config.hidden_size
    dim = width // heads
    if family == "phi3":
        keys = config.num_key_value_heads * dim
        return [*range(width, width + keys)], [*range(width + keys, width + 2 * keys)]
    if family == "falcon":
        if not config.new_decoder_architecture:
            return [*range(width, width + dim)], [*range(width + dim, width + 2 * dim)]
        group = heads // config.num_kv_heads + 2
        starts = [(head * group + group - 2) * dim for head in range(config.num_kv_heads)]
        keys = [start + row for start in starts for row in range(dim)]
        return keys, [row + dim for row in keys]
    assert family == "gpt_neox"
    keys = [(3 * head + 1) * dim + row for head in range(heads) for row in range(dim)]
    return keys, [row + dim for row in keys]


def low_rank(linear: nn.Linear, share: float, pivoted: bool) -> LowRankLinear:
    rank = max(1, round(share * min(linear.weight.shape)))
    factors = decompose_outputs(linear.weight.detach().double()).truncate(rank)
    return LowRankLinear.from_factors(linear, factors, pivoted)


def make_low_rank(
    family: str, model: Any, share: float, pivoted: bool
) -> dict[str, tuple[str, str]]:
    """Swap the linears of keys and values of each attention; give their names."""
    attentions = {}
    for name, module in list(model.named_modules()):
        fused = next((f for f in ("qkv_proj", "query_key_value") if hasattr(module, f)), None)
        if fused is not None:
            rows = fused_rows(family, model.config)
            setattr(module, fused, SplitLinear.from_linear(getattr(module, fused), *rows))
            parts = (f"{fused}.keys", f"{fused}.values")
        elif hasattr(module, "k_proj"):
            parts = ("k_proj", "v_proj")
        else:
            continue
        for part in parts:
            module.set_submodule(part, low_rank(module.get_submodule(part), share, pivoted))
        attentions[name] = tuple(f"{name}.{part}" for part in parts)
    return attentions


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "pivoted"])
def make_latent(request: Any, make_model: Callable[..., Any]) -> Callable[..., Any]:
    """`make_latent(family, share=0.6, dtype=float64, **overrides)`: rank kept, cache attached.

    Every test that uses it runs in both layouts.
    """

    def make(
        family: str, share: float = 0.6, dtype: torch.dtype = torch.float64, **overrides: Any
    ) -> Any:
        model = make_model(family, dtype=dtype, **overrides)
        attach_latent_cache(model, make_low_rank(family, model, share, request.param))
        return model

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Two sequences of 40 tokens, longer than two windows of sliding attention."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, 96, (2, 40), generator=generator)
