"""From which linears the cached keys and values of a model come.

Nothing here knows the name of an architecture. One forward tells which modules write to the
key/value cache. Each of them is then run alone, with linears that answer with the numbers of their
rows, until it hands keys and values over: gradients tell which linears these come from, and the
numbers tell which rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.model.anatomy import block_path
from slimrank.model.cache_calls import TOKENS, CacheCall, cache_calls
from slimrank.model.handover import UNIT, hand_over
from slimrank.nn import LowRankLinear


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention with keys and values in the cache.

    Parameters
    ----------
    name : str
        Full dotted name of the module whose forward updates the cache.
    block : int
        Position in the block list.
    layer : int
        The layer of the cache.
    keys, values : str
        Full dotted names of the linears that they come from; the same if that is a fused one.
    key_rows, value_rows : tuple of int or None
        None for the whole linear; else rows of its output, in the order (head, feature) in which
        the cache sees them, each once (some models cache several copies of a head).
    key_features, value_features : int
        What a token puts into an ordinary cache, copies counted once.
    """

    name: str
    block: int
    layer: int
    keys: str
    values: str
    key_rows: tuple[int, ...] | None
    value_rows: tuple[int, ...] | None
    key_features: int
    value_features: int


def find_attention(model: nn.Module, path: str | None = None) -> list[AttentionSite]:
    """Find where the keys and values of each attention come from.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, in eval mode; on the meta device too.
    path : str, optional
        The block list, if it cannot be told (see `block_path`).

    Returns
    -------
    list of AttentionSite
        In call order.

    Raises
    ------
    ModelError
        If nothing writes to a key/value cache, several modules write to one layer of it, keys or
        values come from several linears or part of one, or a fused projection has normalised keys.
    """
    path = block_path(model, path)
    calls = cache_calls(model, path)
    if not calls:
        raise ModelError(f"{type(model).__name__} has no attention that writes a key/value cache")
    writers: dict[int, str] = {}
    for call in calls:
        if call.layer in writers:
            raise ModelError(
                f"{writers[call.layer]} and {call.name} both write to layer {call.layer} of the "
                "key/value cache, which is not supported for --kv-keep"
            )
        if call.name in writers.values():
            raise ModelError(f"{call.name} writes to several layers of the key/value cache")
        writers[call.layer] = call.name
    return [_site(model, path, call) for call in calls]


def _site(model: nn.Module, path: str, call: CacheCall) -> AttentionSite:
    if not call.name.startswith(f"{path}."):
        raise ModelError(f"{call.name} writes keys and values but is no part of {path}")
    linears = dict(_linears(call.name, model.get_submodule(call.name)))
    found = hand_over(model, call, linears)
    keys, all_keys = _source(call.name, "keys", found.keys, found.answers)
    values, all_values = _source(call.name, "values", found.values, found.answers)
    key_rows = value_rows = None
    if keys == values:
        key_rows = _rows(keys, "keys", found.keys, linears[keys].out_features)
        value_rows = _rows(values, "values", found.values, linears[values].out_features)
        if set(key_rows) & set(value_rows):
            raise ModelError(f"keys and values of {call.name} are the same outputs of {keys}")
    elif not (all_keys and all_values):
        part, what = (values, "values") if all_keys else (keys, "keys")
        raise ModelError(f"only a part of {part} makes {what}, which --kv-keep does not support")
    return AttentionSite(
        name=call.name,
        block=int(call.name.removeprefix(f"{path}.").split(".")[0]),
        layer=call.layer,
        keys=keys,
        values=values,
        key_rows=key_rows,
        value_rows=value_rows,
        key_features=linears[keys].out_features if key_rows is None else len(key_rows),
        value_features=linears[values].out_features if value_rows is None else len(value_rows),
    )


def _linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Linear | LowRankLinear]]:
    """Topmost linears, with their full names."""
    if isinstance(module, (nn.Linear, LowRankLinear)):
        yield name, module
        return
    for local, child in module.named_children():
        yield from _linears(f"{name}.{local}", child)


def _source(
    name: str, what: str, states: Tensor, answers: Sequence[tuple[str, Tensor]]
) -> tuple[str, bool]:
    """Name the one linear that states come from, and tell whether all its rows matter."""
    found: list[tuple[str, bool]] = []
    if states.requires_grad:
        draw = torch.Generator().manual_seed(0)
        weights = torch.randn(states.shape, generator=draw, device="cpu")
        gradients = torch.autograd.grad(
            states, [a for _, a in answers], weights, retain_graph=True, allow_unused=True
        )
        for (linear, _), gradient in zip(answers, gradients, strict=True):
            if gradient is not None and bool((gradient != 0).any()):
                rows = gradient.reshape(-1, gradient.shape[-1])
                found.append((linear, bool((rows != 0).any(0).all())))
    names = [linear for linear, _ in answers]
    for linear in dict(found):
        if names.count(linear) > 1:
            raise ModelError(f"{linear} runs several times in {name}, which --kv-keep cannot take")
    if len(found) != 1:
        sources = " and ".join(dict(found)) or "no linear inside it"
        raise ModelError(
            f"the {what} of {name} come from {sources}; --kv-keep needs exactly one linear"
        )
    return found[0]


def _rows(linear: str, what: str, states: Tensor, out_features: int) -> tuple[int, ...]:
    """Read row numbers off the states of shape (1, heads, TOKENS, features)."""
    if states.ndim == 4 and states.shape[2] == TOKENS:
        numbers, turned = (states.detach()[0] / UNIT).unbind(1)
        rows = numbers.flatten().round()
        inside = bool(((rows >= 0) & (rows < out_features)).all())
        again = torch.equal(turned.flatten(), out_features - 1 - rows)
        if inside and again and torch.equal(rows, numbers.flatten()):
            return tuple(dict.fromkeys(int(row) for row in rows.tolist()))
    raise ModelError(
        f"{linear}: fused projection with normalised {what} is not supported for --kv-keep "
        "(the cache does not hold plain outputs of it)"
    )
