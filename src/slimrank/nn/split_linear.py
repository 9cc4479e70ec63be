"""A linear taken apart by rows: those that make keys, those that make values, and the rest."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slimrank.errors import ModelError
from slimrank.nn.int8_linear import Int8Linear
from slimrank.nn.low_rank_linear import LowRankLinear

Ranges = tuple[tuple[int, int], ...]


class SplitLinear(nn.Module):
    """Three linears in the place of one ``nn.Linear`` whose rows serve queries, keys and values.

    A fused projection gives queries, keys and values at once, in whatever order its architecture
    likes. Here `keys` and `values` are linears of their own, so that each can be compressed and
    cached as such; `forward` puts their outputs back between those of `rest`, and the attention
    around it sees no difference. The order of rows is kept as plain numbers, not as a tensor: there
    is nothing to load, and nothing to move between devices.

    State-dict keys are those of the children, and ``weight``, empty, of shape ``(0,)``: the
    sentinel of `LowRankLinear`. Biases are with the children.

    Parameters
    ----------
    in_features, out_features : int
        Of the whole.
    key_ranges, value_ranges : sequence of (start, stop)
        Rows of the whole that make keys and values, in the order that `keys` and `values` have
        them in. All other rows belong to `rest`, in order; without any, `rest` is None.
    bias : bool
    device, dtype : optional
        As for ``nn.Linear``.

    Raises
    ------
    ModelError
        If a range is empty or out of bounds, two overlap, or there are none.

    Examples
    --------
    >>> layer = SplitLinear(8, 12, key_ranges=[(2, 4), (8, 10)], value_ranges=[(4, 6), (10, 12)])
    >>> sorted((name, tuple(t.shape)) for name, t in layer.state_dict().items())[1:4]
    [('keys.weight', (4, 8)), ('rest.bias', (4,)), ('rest.weight', (4, 8))]
    >>> layer(torch.ones(3, 8)).shape
    torch.Size([3, 12])
    """

    weight: Tensor
    rest: nn.Linear | LowRankLinear | Int8Linear | None
    keys: nn.Linear | LowRankLinear | Int8Linear
    values: nn.Linear | LowRankLinear | Int8Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        key_ranges: Sequence[Sequence[int]],
        value_ranges: Sequence[Sequence[int]],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.key_ranges = _checked(key_ranges, "keys")
        self.value_ranges = _checked(value_ranges, "values")
        self.rest_ranges = _gaps(self.key_ranges + self.value_ranges, out_features)
        for name, ranges in self._ranges():
            child = nn.Linear(in_features, _width(ranges), bias, device, dtype) if ranges else None
            self.register_module(name, child)
        filled = [ranges for _, ranges in self._ranges() if ranges]
        self._sizes = [[stop - start for start, stop in ranges] for ranges in filled]
        starts = [start for ranges in filled for start, _ in ranges]
        self._order = sorted(range(len(starts)), key=starts.__getitem__)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, key_rows: Sequence[int], value_rows: Sequence[int]
    ) -> "SplitLinear":
        """Take a linear's place: its device, dtype and mode, each of its rows copied once.

        Parameters
        ----------
        linear : nn.Linear
        key_rows, value_rows : sequence of int
            In the order that the children shall have them in.

        Raises
        ------
        ModelError
            As the constructor.
        """
        key_ranges, value_ranges = compact_ranges(key_rows), compact_ranges(value_rows)
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, key_ranges, value_ranges, False)
        for name, ranges in layer._ranges():
            child = layer.get_submodule(name) if ranges else None
            if child is not None:
                child.weight = _rows(linear.weight, ranges)
                child.bias = None if linear.bias is None else _rows(linear.bias, ranges)
        layer.weight = torch.empty_like(linear.weight[:0, 0]).detach()
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Put the rows back into one ordinary linear of the same function."""
        parts = [
            child.to_linear() if isinstance(child, LowRankLinear | Int8Linear) else child
            for child in self._children()
        ]
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        trained = any(p.requires_grad for part in parts for p in part.parameters())
        weight = self._merge([part.weight.detach() for part in parts], 0)
        linear.weight = nn.Parameter(weight, trained)
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        if biases:
            linear.bias = nn.Parameter(self._merge(biases, 0), trained)
        return linear.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return self._merge([child(inputs) for child in self._children()], -1)

    def extra_repr(self) -> str:
        """Show the sides, and how many rows make keys and values."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"key_rows={_width(self.key_ranges)}, value_rows={_width(self.value_ranges)}"
        )

    def _ranges(self) -> Iterator[tuple[str, Ranges]]:
        yield from zip(
            ("rest", "keys", "values"),
            (self.rest_ranges, self.key_ranges, self.value_ranges),
            strict=True,
        )

    def _children(self) -> list[nn.Linear | LowRankLinear | Int8Linear]:
        return [child for child in (self.rest, self.keys, self.values) if child is not None]

    def _merge(self, parts: list[Tensor], dim: int) -> Tensor:
        """Cut what each child gives into its ranges, and put all in the order of the whole."""
        pieces = [
            piece
            for part, sizes in zip(parts, self._sizes, strict=True)
            for piece in part.split_with_sizes(sizes, dim)
        ]
        return torch.cat([pieces[index] for index in self._order], dim)


def compact_ranges(rows: Iterable[int]) -> Ranges:
    """Row numbers as runs ``(start, stop)``, in the order in which they come.

    Examples
    --------
    >>> compact_ranges([4, 5, 6, 0, 1])
    ((4, 7), (0, 2))
    """
    ranges: list[tuple[int, int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def _checked(ranges: Sequence[Sequence[int]], what: str) -> Ranges:
    if not ranges or any(len(pair) != 2 or pair[0] >= pair[1] for pair in ranges):
        raise ModelError(f"rows of {what}, {list(ranges)}, are no ranges of start and stop")
    return tuple((start, stop) for start, stop in ranges)


def _gaps(ranges: Ranges, end: int) -> Ranges:
    """What the ranges leave of ``[0, end)``; refuses those that overlap or stick out."""
    gaps: list[tuple[int, int]] = []
    last = 0
    for start, stop in sorted(ranges):
        if start < last or stop > end:
            raise ModelError(
                f"rows {start} to {stop} of a split linear overlap others or leave its {end} rows"
            )
        if start > last:
            gaps.append((last, start))
        last = stop
    return (*gaps, *([(last, end)] if last < end else []))


def _width(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _rows(parameter: Tensor, ranges: Ranges) -> nn.Parameter:
    rows = torch.cat([parameter.detach()[start:stop] for start, stop in ranges])
    return nn.Parameter(rows, parameter.requires_grad)
