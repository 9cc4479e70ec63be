"""Layers of a transformers cache that hold latents in the place of keys and values."""

import weakref
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from slimrank.errors import ModelError
from slimrank.nn.key_path import Positions
from slimrank.nn.latent_tap import LatentTap, TappedCall

WRONG_MODEL = (
    "this cache holds latents of another model, or of this one before its cache of latents was "
    "attached again or detached. Make a cache for each model: pass none, or a new DynamicCache()"
)


class TokenPositions:
    """The position embeddings of cached tokens, once for all layers that are given the same.

    They are stored as they came, so any kind of rotation and any padding is right. The layer that
    came first owns them and does to them what is done to it.

    Parameters
    ----------
    window : int or None
        Of the layers, as theirs.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.store: Any = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        self._last: tuple[weakref.ref[Tensor], ...] = ()
        self._all: Positions | None = None

    def append(self, pair: Positions) -> Positions:
        """Add those of new tokens, ``(1 or batch, tokens, rotary)``; return those in sight."""
        if self.store.get_seq_length() == 0:
            self.store.reset()  # what was cropped to nothing would keep its rows
        new = max(part.shape[0] for part in pair)
        old = self.store.keys.shape[0] if self.store.get_seq_length() else new
        if old < new:
            self.store.batch_repeat_interleave(new)
        wide = [part.expand(max(old, new), -1, -1)[:, None] for part in pair]
        cosines, sines = self.store.update(*wide)
        self._last = tuple(weakref.ref(part) for part in pair)
        self._all = cosines[:, 0], sines[:, 0]
        return self._all

    def holds(self, pair: Positions) -> bool:
        """Whether these are the ones that were added last."""
        return len(self._last) == 2 and all(
            old() is new for old, new in zip(self._last, pair, strict=True)
        )

    def in_sight(self, pair: Positions) -> Positions:
        """What the last `append` returned, for a layer that was given the same.

        Raises
        ------
        ModelError
            If the layer was given others.
        """
        if self._all is None or not self.holds(pair):
            raise ModelError(
                "layers that shared their position embeddings at a cache's first tokens no longer "
                "do; the cache of latents cannot go on. Use the model without"
            )
        return self._all

    def follow(self, name: str, *args: Any, record_past: bool) -> None:
        """Do what is done to the owner. One row of positions serves any batch."""
        if not self.store.is_initialized:
            return
        self.store.record_past = record_past
        if name == "crop" or self.store.keys.shape[0] > 1:
            getattr(self.store, name)(*args)
        self._all = None


class _Latents:
    """The part of a cache layer that knows latents; the rest is transformers' own.

    ``keys`` is ``(batch, 1, tokens, key rank)``, ``values`` ``(batch, 1, tokens, value rank)``:
    the layout of one head, so all that transformers does to a cache (crop, beams, windows) works
    on latents as it does on keys and values.
    """

    _tap: "weakref.ref[LatentTap]"
    _shared: list[TokenPositions]
    _positions: TokenPositions | None = None
    _owns_positions = False

    def bind(self, tap: LatentTap, shared: list[TokenPositions]) -> None:
        """Say whose latents these will be, and which list all layers keep their positions in.

        The reference is weak: a copy of a cache is a cache for the same model, not a copy of it.
        """
        self._tap = weakref.ref(tap)
        self._shared = shared

    @property
    def positions(self) -> TokenPositions | None:
        """Where this layer's position embeddings are, if it has any yet."""
        return self._positions

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store the latents of new tokens, and return the states of all in sight.

        Parameters
        ----------
        key_states, value_states : Tensor
            Of the new tokens, ``(batch, heads, tokens, head_dim)``: what the latents that the tap
            has just heard were made into.

        Returns
        -------
        (Tensor, Tensor)
            Without older tokens, the states that were given; else `LatentStates`.

        Raises
        ------
        ModelError
            If the attention that calls is not the one this layer was made for; or if it makes of
            its latents, at the first tokens, what cannot be made again.
        """
        tap = self._tap()
        heard = None if tap is None else tap.take()
        if tap is None or heard is None:
            raise ModelError(WRONG_MODEL)
        batch, tokens = key_states.shape[0], key_states.shape[2]
        keys = heard.key_latents.reshape(batch, tokens, -1)
        values = heard.value_latents.reshape(batch, tokens, -1)
        call = TappedCall(heard.arguments, heard.cache, keys, values)
        is_first = self.get_seq_length() == 0  # type: ignore[attr-defined]
        if is_first:
            tap.verify(call, key_states, value_states)
        pair = self._all_positions(call)
        keys, values = super().update(  # type: ignore[misc]
            keys[:, None], values[:, None], *args, **kwargs
        )
        if is_first:
            return key_states, value_states
        return (
            tap.lazy_keys(call, keys[:, 0], pair, key_states),
            tap.lazy_values(values[:, 0], value_states),
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self._lead("crop", tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of beams that survive."""
        self._lead("reorder_cache", beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._lead("batch_repeat_interleave", repeats)
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._lead("batch_select_indices", indices)
        super().batch_select_indices(indices)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget all tokens."""
        if self._positions is not None and self._owns_positions:
            self._shared.remove(self._positions)
        self._positions, self._owns_positions = None, False
        super().reset()  # type: ignore[misc]

    def _lead(self, name: str, *args: Any) -> None:
        if self._positions is not None and self._owns_positions:
            self._positions.follow(name, *args, record_past=self._record_past())

    def _record_past(self) -> bool:
        return bool(getattr(self, "record_past", False))

    def _all_positions(self, call: TappedCall) -> Positions | None:
        """Position embeddings of all tokens in sight, those of the call among them."""
        pair = call.positions()
        if pair is None:
            return None
        window = getattr(self, "sliding_window", None)
        if self._positions is None:
            same = [p for p in self._shared if p.window == window and p.holds(pair)]
            self._owns_positions = not same
            self._positions = same[0] if same else TokenPositions(window)
            self._shared += [] if same else [self._positions]
        if not self._owns_positions:
            return self._positions.in_sight(pair)
        self._positions.store.record_past = self._record_past()
        return self._positions.append(pair)


class LatentLayer(_Latents, DynamicLayer):  # type: ignore[misc]
    """Latents of all tokens."""


class LatentSlidingLayer(_Latents, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Latents of the tokens in a sliding window."""
