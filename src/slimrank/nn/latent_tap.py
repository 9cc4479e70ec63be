"""What a cache of latents must hear of each call of an attention."""

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from slimrank.errors import ModelError
from slimrank.linalg import in_float64
from slimrank.nn.key_path import POSITIONS, KeyPath, Positions
from slimrank.nn.latent_states import LatentKeys, LatentStates, LatentValues
from slimrank.nn.low_rank_linear import LowRankLinear

# what code that meets shapes or arguments it does not expect may raise
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class TappedCall:
    """One call of an attention, between its projections and its cache.

    Attributes
    ----------
    arguments : dict
        All of its arguments, by name.
    cache : str
        The argument that is the cache.
    key_latents, value_latents : Tensor
        As the projections gave them, ``(..., rank)``.
    """

    arguments: dict[str, Any]
    cache: str
    key_latents: Tensor
    value_latents: Tensor

    def positions(self) -> Positions | None:
        """Position embeddings of the call's tokens: None where the model hands out none.

        Raises
        ------
        ModelError
            If they are no pair of ``(1 or batch, tokens, rotary)``.
        """
        pair = self.arguments.get(POSITIONS)
        if pair is None:
            return None
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or any(not isinstance(part, Tensor) or part.ndim != 3 for part in pair)
        ):
            raise ModelError(
                "the attention's position embeddings are no pair of cosines and sines, (batch, "
                "tokens, rotary) each; a cache of latents cannot keep them. Use the model without"
            )
        device = self.key_latents.device
        return pair[0].to(device), pair[1].to(device)


class LatentTap:
    """Listens to one attention and the two linears in it that make its keys and values.

    A tap belongs to the attention: its methods are the hooks, so a deep copy of the model has taps
    of its own.

    Parameters
    ----------
    name : str
        Of the attention in its model.
    attention : nn.Module
    keys, values : LowRankLinear
        Inside the attention.

    Raises
    ------
    ModelError
        If they are not.
    """

    def __init__(
        self, name: str, attention: nn.Module, keys: LowRankLinear, values: LowRankLinear
    ) -> None:
        inside = set(attention.modules())
        if not {keys, values} <= inside or keys is values:
            raise ModelError(f"{name}: the linears of keys and values are not two linears in it")
        self.name = name
        self.attention, self._keys, self._values = attention, keys, values
        self._names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        self._query_width: int | None = None
        self._handles: list[RemovableHandle] = []
        # arguments and latents of the call in each thread
        self._running: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = {}

    def attach(self) -> None:
        """Begin to listen."""
        self._handles = [
            self.attention.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.attention.register_forward_hook(self.end, always_call=True),
        ]
        self._keys.on_latent = self.hear_keys
        self._values.on_latent = self.hear_values

    def detach(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._keys.on_latent = self._values.on_latent = None

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention: note its arguments, if one is a cache that may hold latents."""
        self.end()
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        if any(type(value) is DynamicCache for value in arguments.values()):
            self._running[threading.get_ident()] = arguments, {}

    def end(self, *_: object) -> None:
        """After the attention, however it ended: forget what no cache took."""
        if self._running:  # a graph that is compiled with another cache comes no further
            self._running.pop(threading.get_ident(), None)

    def hear_keys(self, latents: Tensor) -> None:
        """Note the latents of the keys, while an attention with a cache is running."""
        self._hear("keys", latents)

    def hear_values(self, latents: Tensor) -> None:
        """Note the latents of the values."""
        self._hear("values", latents)

    def _hear(self, what: str, latents: Tensor) -> None:
        if self._running:
            _, heard = self._running.get(threading.get_ident(), ({}, {}))
            heard[what] = latents

    def take(self) -> TappedCall | None:
        """Hand over the call that goes on: None if this attention is not the one that runs."""
        arguments, latents = self._running.pop(threading.get_ident(), ({}, {}))
        if len(latents) != 2:
            return None
        cache = next(name for name, value in arguments.items() if type(value) is DynamicCache)
        return TappedCall(arguments, cache, latents["keys"], latents["values"])

    def lazy_keys(
        self, call: TappedCall, latents: Tensor, positions: Positions | None, like: Tensor
    ) -> LatentStates:
        """Keys of all cached tokens, ``(batch, heads, tokens, head_dim)``, with heads as `like`."""
        path = self._path(call, self._query_width)
        return LatentStates(LatentKeys(path, latents, positions, like))

    def lazy_values(self, latents: Tensor, like: Tensor) -> LatentStates:
        """Values of all cached tokens, with heads as `like`."""
        return LatentStates(LatentValues(self._values, latents, like))

    def verify(self, call: TappedCall, keys: Tensor, values: Tensor) -> None:
        """Compare what the latents of a call's last token give with what the model made of it.

        Parameters
        ----------
        call : TappedCall
            Its latents ``(batch, tokens, rank)``.
        keys, values : Tensor
            ``(batch, heads, tokens, head_dim)``, as the attention gave them to its cache.

        Raises
        ------
        ModelError
            If they differ by more than rounding: the architecture does something to its keys or
            values that is not done again here.
        """
        if keys.is_meta:
            return
        last = slice(keys.shape[2] - 1, None)
        pair = call.positions()
        pair = None if pair is None else (pair[0][:, last], pair[1][:, last])
        fault = "they differ"
        try:
            latents = call.value_latents[:, last]
            rebuilt = LatentValues(self._values, latents, values).dense()
        except FAULTS as error:
            raise self._refusal("values", str(error)) from error
        if not _agree(rebuilt, values[:, :, last]):
            raise self._refusal("values", fault)
        # one token tells whether zeros of one head will do: heads taken apart by number, not by
        # width, cannot be made of them
        for width in (keys.shape[3], None):
            try:
                rebuilt = self._path(call, width).rebuild(call.key_latents[:, last], pair)
            except FAULTS as error:
                fault = str(error)
                continue
            if _agree(rebuilt, keys[:, :, last]):
                self._query_width = width
                return
        raise self._refusal("keys", fault)

    def _path(self, call: TappedCall, width: int | None) -> KeyPath:
        return KeyPath(
            self.attention, self._keys, call.arguments, self._names[0], call.cache, width
        )

    def _refusal(self, what: str, fault: str) -> ModelError:
        return ModelError(
            f"{self.name}: its {what} cannot be made again from latents ({fault}); detach the "
            "cache of latents from this model"
        )


def _agree(rebuilt: Tensor, live: Tensor) -> bool:
    """Whether two results are one but for rounding; what is not finite in both is left out."""
    if rebuilt.shape != live.shape:
        return False
    finite = live.isfinite()
    difference = in_float64(torch.where(finite, rebuilt - live, 0)).norm()
    size = in_float64(torch.where(finite, live, 0)).norm()
    # half a dtype's digits, and no more of them than TF32 leaves
    limit = max(torch.finfo(live.dtype).eps ** 0.5, 2.0**-8)
    return bool(difference <= limit * size)
