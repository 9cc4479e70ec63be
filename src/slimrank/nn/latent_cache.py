"""The key/value cache of latents: one line makes a model use it, one takes it away.

Per layer and token, an attention with a plain cache stores its keys and values, ``n_k + n_v``
numbers (heads times head_dim each). Where both come from linears of low rank, the latents between
the factors say as much in ``r_k + r_v`` numbers. Swift-SVD, section 5.3 and figure 1, caches them;
it says nothing of rotations, norms, masks and padding. Here these stay with the model's own code:
keys are rebuilt by its attention (`slimrank.nn.key_path`), from the position embeddings it was
given, and cached latents are those before rotation and norms.

A decode step at T cached tokens costs, per layer and sequence, with H query heads of d dimensions::

                    FLOPs                                            bytes read
    latents, keys    2 T r_k n_k + 2 T H d                            T r_k
    latents, values  2 T H r_v + 2 H r_v d                            T r_v
    dense            4 T H d                                          T (n_k + n_v)

times the bytes of a number. Values are never expanded. Keys are, 1,024 tokens at a time, for a
rotation stands between the factor and the product with the query. So the cache saves memory, and
traffic where ``r_k + r_v < n_k + n_v``; it pays for that in arithmetic with the keys. A prefill
without older tokens costs nothing extra; a prefill in chunks expands a layer's keys and values
for the time of its attention.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slimrank.errors import ModelError
from slimrank.nn.latent_layer import LatentLayer, LatentSlidingLayer, TokenPositions
from slimrank.nn.latent_tap import LatentTap
from slimrank.nn.low_rank_linear import LowRankLinear

_ATTACHED = "_slimrank_latent_cache"
_CACHE = "past_key_values"


def attach_latent_cache(model: nn.Module, attentions: Mapping[str, tuple[str, str]]) -> None:
    """Make a model cache latents, in ``generate`` and in plain calls with ``use_cache=True``.

    An empty `DynamicCache` that the model is called with becomes one of latents, in place, and
    where it would make a cache it makes one of latents. All other caches (static, quantized,
    offloaded, or with tokens in it) stay what they are, and work. So do layers that are not named.
    A cache of latents can be cropped, reordered, repeated, reset and deep-copied; it serves the
    model that filled it, and is refused by others. Deep copies of the model have caches of their
    own. Attaching again forgets what was attached.

    Parameters
    ----------
    model : nn.Module
        A transformers model.
    attentions : mapping from str to (str, str)
        For each attention module, the names of the linears that make its keys and its values: all
        full names in `model`. In every forward of the attention each of the two runs once.

    Raises
    ------
    ModelError
        If a name is no module, a linear is no `LowRankLinear`, or an attention has no
        ``layer_idx`` of its own. Later, at the first tokens of a cache, if an attention does
        something to its keys or values that cannot be done again from latents.

    Notes
    -----
    Costs are on the page of this module; `latent_bytes` foretells the size, `cache_bytes` takes it.
    """
    detach_latent_cache(model)
    modules = dict(model.named_modules())
    taps: dict[int, LatentTap] = {}
    for name, (keys, values) in attentions.items():
        attention = _module(modules, name)
        index = getattr(attention, "layer_idx", None)
        if not isinstance(index, int) or index in taps:
            raise ModelError(
                f"{name} has layer_idx {index!r}, which does not name a layer of a cache of its own"
            )
        parts = _low_rank(modules, keys), _low_rank(modules, values)
        taps[index] = LatentTap(name, attention, *parts)
    setattr(model, _ATTACHED, _Attachment(model, taps))


def detach_latent_cache(model: nn.Module) -> None:
    """Give a model its ordinary cache back; nothing happens if it has it.

    Parameters
    ----------
    model : nn.Module
        What `attach_latent_cache` was given, or a deep copy of it.
    """
    attached = getattr(model, _ATTACHED, None)
    if attached is not None:
        attached.remove()
        delattr(model, _ATTACHED)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors in a cache of latents, or in an ordinary one.

    Examples
    --------
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), layer_idx=0)
    >>> cache_bytes(cache)
    640
    """
    stores: dict[int, Any] = {id(layer): layer for layer in cache.layers}
    for layer in cache.layers:
        positions = getattr(layer, "positions", None)
        if positions is not None:
            stores[id(positions)] = positions.store
    return sum(
        part.nbytes
        for store in stores.values()
        for part in (store.keys, store.values)
        if isinstance(part, torch.Tensor)
    )


def latent_bytes(
    ranks: Iterable[tuple[int, int]],
    tokens: int,
    batch: int,
    itemsize: int,
    rotary: int = 0,
    position_rows: int | None = None,
) -> int:
    """Bytes of a cache of latents, foretold.

    ``tokens * (batch * sum(r_k + r_v) + position_rows * 2 * rotary) * itemsize``. For a model with
    more than one kind of layer (windows, rotations), add up its kinds; a window of w keeps
    ``min(tokens, w - 1)``.

    Parameters
    ----------
    ranks : iterable of (int, int)
        Of keys and values, for each layer.
    tokens, batch, itemsize : int
        Cached tokens of a sequence, sequences, bytes of a number.
    rotary : int
        Width of the position embeddings; 0 for a model without. They are kept once for all layers.
    position_rows : int, optional
        Sequences with positions of their own: `batch`, as in ``generate``, if not given; 1 for
        calls of the model without ``position_ids``.

    Examples
    --------
    Two layers of 24 + 32 numbers, in bfloat16: a dense cache of 8 heads of 64 has 2,048 a token.

    >>> latent_bytes([(24, 32), (24, 32)], tokens=1000, batch=1, itemsize=2, rotary=64)
    480000
    """
    rows = batch if position_rows is None else position_rows
    numbers = batch * sum(keys + values for keys, values in ranks) + rows * 2 * rotary
    return tokens * numbers * itemsize


class _Attachment:
    """The taps and hooks of one model."""

    def __init__(self, model: nn.Module, taps: dict[int, LatentTap]) -> None:
        from transformers.modeling_utils import (
            PreTrainedModel,
        )  # loads much that help does not need

        self._taps = taps
        # some models call past what they wrap: each that can be called may be the one that is
        self._handles = [
            part.register_forward_pre_hook(self.prepare, with_kwargs=True)
            for part in model.modules()
            if isinstance(part, PreTrainedModel)
            and _CACHE in _forward_names(part)
            and {tap.attention for tap in taps.values()} & set(part.modules())
        ]
        for tap in taps.values():
            tap.attach()

    def remove(self) -> None:
        """Take away every hook."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps.values():
            tap.detach()

    def prepare(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a forward: see that its cache, if it will have one, is of latents."""
        names = _forward_names(model)
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given.get(_CACHE)
        if type(cache) is DynamicCache:
            self._convert(cache)
        uses_cache = given.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(model.config.get_text_config(decoder=True), "use_cache", False)
        if cache is not None or not uses_cache or model.training:
            return args, kwargs
        cache = DynamicCache(config=model.config)
        self._convert(cache)
        place = names.index(_CACHE)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, kwargs | {_CACHE: cache}

    def _convert(self, cache: DynamicCache) -> None:
        """Replace the layers of an empty cache, each by one of latents of its kind."""
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        plain = [layer for layer in cache.layers if type(layer) in kinds]
        lazy = not cache.layers  # made without a config: it will hold all tokens of all layers
        if cache.offloading or not (plain or lazy) or any(p.is_initialized for p in plain):
            return
        shared: list[TokenPositions] = []
        layers = [DynamicLayer() for _ in range(max(self._taps) + 1)] if lazy else cache.layers
        for index, tap in self._taps.items():
            if index < len(layers) and type(layers[index]) in kinds:
                layers[index] = _latent_layer(layers[index], tap, shared)
        cache.layers = layers


def _latent_layer(
    plain: DynamicLayer, tap: LatentTap, shared: list[TokenPositions]
) -> LatentLayer | LatentSlidingLayer:
    """Make the layer of latents that stands for an empty plain one."""
    layer: LatentLayer | LatentSlidingLayer
    if type(plain) is DynamicSlidingWindowLayer:
        layer = LatentSlidingLayer(plain.sliding_window)
        layer.record_past = getattr(plain, "record_past", False)
    else:
        layer = LatentLayer()
    layer.bind(tap, shared)
    return layer


def _forward_names(model: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def _low_rank(modules: Mapping[str, nn.Module], name: str) -> LowRankLinear:
    linear = _module(modules, name)
    if not isinstance(linear, LowRankLinear):
        kind = type(linear).__name__
        raise ModelError(f"{name} is a {kind}, no LowRankLinear: it has no latents to cache")
    return linear


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in modules:
        raise ModelError(f"the model has no module {name!r} to cache latents of")
    return modules[name]
