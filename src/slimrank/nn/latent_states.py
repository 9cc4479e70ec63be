"""Keys and values that stay latents until an attention needs them, as tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimrank.nn.key_path import KeyPath, Positions
from slimrank.nn.low_rank_linear import LowRankLinear

TILE = 1024  # tokens whose keys are held at a time


class LatentKeys:
    """The keys of one layer: latents, and the way to rebuild keys from them.

    Parameters
    ----------
    path : KeyPath
    latents : Tensor
        ``(batch, tokens, rank)``.
    positions : (Tensor, Tensor) or None
        The position embeddings of these tokens.
    like : Tensor
        Keys of some tokens, as the attention made them, ``(batch, heads, tokens, head_dim)``.
    """

    def __init__(
        self, path: KeyPath, latents: Tensor, positions: Positions | None, like: Tensor
    ) -> None:
        self._path, self._latents, self._positions = path, latents, positions
        self.shape = (latents.shape[0], like.shape[1], latents.shape[1], like.shape[3])
        self.dtype, self.device = like.dtype, like.device

    def tiles(self) -> Iterator[Tensor]:
        """Keys of `TILE` tokens at a time, ``(batch, heads, tile, head_dim)``."""
        for start in range(0, self.shape[2], TILE):
            part = slice(start, start + TILE)
            pair = self._positions
            yield self._path.rebuild(
                self._latents[:, part],
                None if pair is None else (pair[0][:, part], pair[1][:, part]),
            )

    def dense(self) -> Tensor:
        """All of the keys."""
        return torch.cat(list(self.tiles()), dim=2)

    def scores(self, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Products of queries and keys, ``(batch, query heads, queries, tokens)``.

        Query heads that share a head of keys stand beside each other.
        """
        grouped = query.to(dtype).reshape(*self.shape[:2], -1, self.shape[3])
        scores = torch.cat([grouped @ keys.to(dtype).mT for keys in self.tiles()], dim=-1)
        return scores.reshape(*query.shape[:3], -1)


class LatentValues:
    """The values of one layer: latents, and the linear that expands them.

    Parameters
    ----------
    linear : LowRankLinear
        Its outputs are the values, head after head. An architecture that gives each query head a
        copy of its values has more heads than the linear makes.
    latents : Tensor
        ``(batch, tokens, rank)``.
    like : Tensor
        Values of some tokens, as the attention made them, ``(batch, heads, tokens, head_dim)``.
    """

    def __init__(self, linear: LowRankLinear, latents: Tensor, like: Tensor) -> None:
        self._linear, self._latents = linear, latents
        self.shape = (latents.shape[0], like.shape[1], latents.shape[1], like.shape[3])
        self.dtype, self.device = like.dtype, like.device

    def dense(self) -> Tensor:
        """All of the values, ``(batch, heads, tokens, head_dim)``."""
        batch, heads, tokens, head_dim = self.shape
        values = self._linear.expand_latents(self._latents)
        values = values.view(batch, tokens, -1, head_dim).transpose(1, 2).contiguous()
        copies = heads // values.shape[1]
        return values.repeat_interleave(copies, dim=1) if copies > 1 else values

    def can_mix(self) -> bool:
        """Whether the second factor is a plain matrix beside the latents: no adapter, no codes."""
        expand = self._linear.expand
        plain = type(expand) is nn.Linear and type(expand.weight) is nn.Parameter
        here = [expand.weight, self._linear.pivots] if self._linear.pivoted else [expand.weight]
        return plain and all(part.device == self._latents.device for part in here)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of values under attention weights; no value is expanded.

        ``w @ (c @ right.mT + bias) = (w @ c) @ right.mT + sum(w) * bias``, with the rows of the
        second factor that belong to each head.

        Parameters
        ----------
        weights : Tensor
            ``(batch, query heads, queries, tokens)``.
        """
        batch, query_heads, queries, tokens = weights.shape
        head_dim = self.shape[3]
        factor = self._linear.expansion()
        factor = factor.reshape(-1, head_dim, factor.shape[1])
        heads, _, rank = factor.shape
        flat = weights.to(self._latents.dtype).reshape(batch, query_heads * queries, tokens)
        mixed = (flat @ self._latents).view(batch, heads, -1, rank).transpose(0, 1)
        sums = mixed.reshape(heads, -1, rank) @ factor.mT
        sums = sums.view(heads, batch, -1, head_dim).transpose(0, 1)
        if self._linear.bias is not None:
            shares = weights.sum(-1).reshape(batch, heads, -1, 1)
            sums = sums + shares.to(sums.dtype) * self._linear.bias.view(heads, 1, head_dim)
        return sums.reshape(batch, query_heads, queries, head_dim)


class LatentStates(Tensor):
    """Keys or values of one layer as the tensor that an attention expects of its cache.

    What attentions do with keys and values stays in latents: a copy of each head for the queries
    that share it, the transpose, the product with few queries,
    ``scaled_dot_product_attention``. Whatever else is asked of it, it is expanded first, so any
    attention gets the right answer, and the known ones get it without the expanded states.

    Parameters
    ----------
    source : LatentKeys or LatentValues
    copies : int
        Of each head, side by side.
    grouped : bool
        Copies are an axis of their own, the third.
    transposed : bool
        The last two axes are exchanged.
    """

    source: LatentKeys | LatentValues
    copies: int
    grouped: bool
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        source: LatentKeys | LatentValues,
        copies: int = 1,
        grouped: bool = False,
        transposed: bool = False,
    ) -> "LatentStates":
        """Make the shape; nothing is stored but the source and how it is looked at."""
        batch, heads, tokens, head_dim = source.shape
        leading = (batch, heads, copies) if grouped else (batch, heads * copies)
        trailing = (head_dim, tokens) if transposed else (tokens, head_dim)
        states: LatentStates = Tensor._make_wrapper_subclass(
            cls, leading + trailing, dtype=source.dtype, device=source.device
        )
        states.source, states.copies = source, copies
        states.grouped, states.transposed = grouped, transposed
        return states

    def dense(self) -> Tensor:
        """Expand it all into an ordinary tensor."""
        states = self.source.dense()
        if self.grouped:
            states = states[:, :, None].expand(-1, -1, self.copies, -1, -1)
        elif self.copies > 1:
            states = states.repeat_interleave(self.copies, dim=1)
        return states.mT if self.transposed else states

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what is known in latents, and expand for everything else."""
        options = dict(kwargs or {})
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, options)  # type: ignore[no-untyped-call]
        known = _KNOWN.get(func)
        result = NotImplemented if known is None else known(*args, **options)
        return _expanded(func, args, options) if result is NotImplemented else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        _: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Expand for kernels that are called from below Python."""
        return _expanded(func, args, dict(kwargs or {}))


def _expanded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def expand(value: object) -> object:
        return value.dense() if isinstance(value, LatentStates) else value

    return func(*tree_map(expand, args), **tree_map(expand, kwargs))


def _index(states: LatentStates, index: object) -> Any:
    """``states[:, :, None]``: the first step of a copy for each query head."""
    parts = list(index) if isinstance(index, tuple) else [index]
    full = slice(None)
    begins = len(parts) in (3, 4, 5) and parts.pop(2) is None
    whole = all(isinstance(part, slice) and part == full for part in parts)
    if not begins or not whole or states.grouped or states.copies > 1 or states.transposed:
        return NotImplemented
    return LatentStates(states.source, grouped=True)


def _expand(states: LatentStates, *sizes: Any) -> Any:
    """Copies along the third axis."""
    sizes = _flat(sizes)
    if not states.grouped or states.transposed or states.copies > 1 or len(sizes) != 5:
        return NotImplemented
    kept = zip(sizes, states.shape, strict=True)
    if any(place != 2 and size not in (own, -1) for place, (size, own) in enumerate(kept)):
        return NotImplemented
    return LatentStates(states.source, copies=max(sizes[2], 1), grouped=True)


def _reshape(states: LatentStates, *sizes: Any) -> Any:
    """Copies and heads become one axis."""
    merged = LatentStates(states.source, states.copies)
    if states.transposed or _flat(sizes) != tuple(merged.shape):
        return NotImplemented
    return merged


def _transpose(states: LatentStates, dim0: int, dim1: int) -> Any:
    if states.grouped or {dim0 % 4, dim1 % 4} != {2, 3}:
        return NotImplemented
    return LatentStates(states.source, states.copies, transposed=not states.transposed)


def _matmul(left: object, right: object) -> Any:
    """Queries times keys, or attention weights times values."""
    if not isinstance(right, LatentStates) or not _fits(left, right):
        return NotImplemented
    assert isinstance(left, Tensor)
    source = right.source
    if isinstance(source, LatentKeys) and right.transposed:
        return source.scores(left, left.dtype)
    if isinstance(source, LatentValues) and not right.transposed and source.can_mix():
        return source.mix(left).to(left.dtype)
    return NotImplemented


def _attend(
    query: Tensor,
    key: object,
    value: object,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` of few queries, softmax in float32 or better.

    Rows that may attend to nothing give zeros, as there.
    """
    if dropout_p or is_causal or not isinstance(key, LatentStates):
        return NotImplemented
    if not isinstance(value, LatentStates) or key.transposed or value.transposed:
        return NotImplemented
    keys, values = key.source, value.source
    if not isinstance(keys, LatentKeys) or not isinstance(values, LatentValues):
        return NotImplemented
    if not values.can_mix() or not all(_fits(query, s, enable_gqa, True) for s in (key, value)):
        return NotImplemented
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = keys.scores(query, dtype) * (keys.shape[3] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if attn_mask is not None:
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(blind, 0)
    else:
        weights = scores.softmax(-1)
    return values.mix(weights).to(query.dtype)


def _fits(left: object, states: LatentStates, gqa: bool = False, attend: bool = False) -> bool:
    """Whether `left` is a tensor of few rows for each head of `states`, all broadcasting done.

    Few are so many that rows times latents cost less than latents expanded: one query, or fewer
    rows for each head of the states than it has dimensions.
    """
    if type(left) is not Tensor or left.ndim != 4 or states.grouped:
        return False
    batch, heads, _, head_dim = states.source.shape
    own = heads * states.copies
    shared = left.shape[1] % own == 0 if gqa else left.shape[1] == own or own == 1
    inner = states.shape[-1 if attend else -2]
    if left.shape[0] != batch or not shared or not (attend or left.shape[3] == inner):
        return False
    rows = left.shape[1] // heads * left.shape[2]
    return left.shape[2] == 1 or rows <= head_dim


def _flat(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


_ABOUT = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__]
)
_KNOWN: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__getitem__: _index,
    Tensor.expand: _expand,
    Tensor.reshape: _reshape,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: lambda states: _transpose(states, -2, -1),  # type: ignore[attr-defined]
    Tensor.contiguous: lambda states: states,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.matmul: _matmul,
    F.scaled_dot_product_attention: _attend,
}
