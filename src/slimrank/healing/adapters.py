"""Adapters of low rank on the factors, by PEFT; at the end they are added to them."""

from typing import Any

import torch
from torch import nn

from slimrank.errors import extra_needed
from slimrank.nn import LowRankLinear
from slimrank.refine import seed_of

FACTORS = ("latent", "expand")


def require_adapters() -> None:
    """See that PEFT is installed, before any work.

    Raises
    ------
    SlimrankError
        If it is not.
    """
    with extra_needed("adapters need peft", "heal"):
        import peft  # noqa: F401


def add_adapters(model: Any, rank: int, seed: int) -> list[nn.Parameter]:
    """Put an adapter on every factor; the model's function is the same until they are trained.

    Parameters
    ----------
    model : PreTrainedModel
        With linears of low rank.
    rank : int
        Of the adapters.
    seed : int
        Of the random half of each; the other half is zero.

    Returns
    -------
    list of nn.Parameter
        Of the adapters, in float32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        f"{name}.{factor}"
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
        for factor in FACTORS
        if getattr(module, factor).weight.numel()
    ]
    if not names:
        return []
    with torch.random.fork_rng():  # its own draw is not kept
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    generator = torch.Generator().manual_seed(seed_of(seed, rank))
    trained: list[nn.Parameter] = []
    for _, layer in _adapted(model):
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.weight.data = part.weight.data.float()
            trained.append(part.weight)
        first = trained[-2].data
        drawn = torch.empty(first.shape)
        first.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))
    return trained


@torch.no_grad()
def merge_adapters(model: Any) -> None:
    """Add the adapters to the factors, each sum rounded once, and take them off again.

    Parameters
    ----------
    model : PreTrainedModel
    """
    for name, layer in _adapted(model):
        linear = layer.get_base_layer()
        for adapter in layer.active_adapters:
            linear.weight.add_(layer.get_delta_weight(adapter))
        model.set_submodule(name, linear)
    del model.peft_config


def _adapted(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
