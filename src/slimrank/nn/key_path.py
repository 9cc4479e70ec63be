"""From key latents to keys, by the model's own attention code."""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn

from slimrank.nn.int8_linear import Int8Linear
from slimrank.nn.low_rank_linear import LowRankLinear

Positions = tuple[Tensor, Tensor]
Module = TypeVar("Module", bound=nn.Module)
POSITIONS = "position_embeddings"  # what transformers calls (cos, sin) in every attention


class KeyPath:
    """The way from latents to the keys that an attention would have cached.

    Between the key projection and the cache, an architecture may add a bias, norm before or after
    it takes the heads apart, and rotate all of a head or some of it. None of this is written here
    a second time. A *shadow* of the attention runs the architecture's own ``forward``: the same
    object but for its linears, where the key projection only expands and all others answer with
    zeros. What it passes to the cache are the keys; there it is stopped.

    Parameters
    ----------
    attention : nn.Module
        Not changed; the shadow reads its parameters and other modules where they are.
    keys : LowRankLinear
        The one inside `attention` that makes the keys.
    arguments : mapping from name to value
        Of the call of `attention` that goes on. Its tensors speak of the tokens of that call, not
        of those whose keys are rebuilt, so the shadow sees their shape and no values: an
        architecture that reads them on the way to its keys fails, and does not give other keys.
    hidden, cache : str
        The arguments that are the hidden states and the cache.
    query_width : int or None
        How many zeros the other linears answer with; None for as many as they have outputs. One
        head of them is enough for most architectures, and saves the rotation of the other heads.
    """

    def __init__(
        self,
        attention: nn.Module,
        keys: LowRankLinear,
        arguments: Mapping[str, Any],
        hidden: str,
        cache: str,
        query_width: int | None,
    ) -> None:
        self._shadow = _shadow(attention, keys, query_width)
        self._arguments = {name: _shape_only(value) for name, value in arguments.items()}
        self._arguments[cache] = _Interceptor()
        self._hidden = hidden

    def rebuild(self, latents: Tensor, positions: Positions | None) -> Tensor:
        """Keys of some tokens.

        Parameters
        ----------
        latents : Tensor
            ``(batch, tokens, rank)``.
        positions : (Tensor, Tensor) or None
            The position embeddings of these tokens, ``(1 or batch, tokens, rotary)`` each.

        Returns
        -------
        Tensor
            ``(batch, heads, tokens, head_dim)``.

        Raises
        ------
        RuntimeError
            If the attention never reaches its cache. Other errors are the attention's own.
        """
        arguments = self._arguments | {self._hidden: latents}
        if positions is not None:
            arguments[POSITIONS] = positions
        try:
            self._shadow.forward(**arguments)
        except _KeysReady as ready:
            return ready.keys
        raise RuntimeError("the attention returned without a call of its cache")


class _KeysReady(Exception):
    """Carries the keys out of the shadow's forward."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _Interceptor:
    """Stands where the cache would, and stops the attention when it stores its keys."""

    def update(self, key_states: Tensor, *_: object, **__: object) -> NoReturn:
        raise _KeysReady(key_states)


class _Zeros(nn.Linear):
    """A linear whose outputs are zeros, and take no memory. The weight is the live one's.

    Parameters
    ----------
    live : nn.Linear, LowRankLinear or Int8Linear
    width : int
        Of the outputs.
    """

    def __init__(self, live: nn.Linear | LowRankLinear | Int8Linear, width: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = live.in_features, width
        self.__dict__.update(_parameters=live._parameters, _buffers=live._buffers)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], self.out_features)


def _expand_only(live: LowRankLinear) -> LowRankLinear:
    """Take latents where the live one takes inputs; its factor and bias are the live ones."""
    linear = _copy(live, live._modules | {"latent": nn.Identity()})
    linear.on_latent = None
    return linear


def _shadow(module: nn.Module, keys: LowRankLinear, width: int | None) -> nn.Module:
    """Copy what holds linears, down to them; everything else is shared."""
    if module is keys:
        return _expand_only(keys)
    if isinstance(module, nn.Linear | LowRankLinear | Int8Linear):
        return _Zeros(module, width or module.out_features)
    children = {
        # linears further down are parts of something that knows their widths
        name: child and _shadow(child, keys, width if _is_linear(child) else None)
        for name, child in module._modules.items()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return _copy(module, children)


def _copy(module: Module, children: dict[str, nn.Module | None]) -> Module:
    """Share all but the children, and what wraps the forward of one object (accelerate does)."""
    shadow = copy.copy(module)
    shadow.__dict__["_modules"] = children
    shadow.__dict__.pop("forward", None)
    return shadow


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LowRankLinear | Int8Linear)


def _shape_only(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value
