"""A linear of low rank: two thin linears with a latent between."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.linalg import Factors, in_float64, pivot_rows
from slimrank.nn.quick_linear import call_linear
from slimrank.nn.row_placement import RowNumbers, Rows, check_pivots, expand_into_rows


class LowRankLinear(nn.Module):
    """``y = expand(latent(x)) + bias``, in the place of an ``nn.Linear``.

    State-dict keys are ``latent.weight (rank, in)``, ``expand.weight (out, rank)``, ``bias (out)``
    if there is one, and ``weight``, empty, of shape ``(0,)``. Both factors are bias-free
    ``nn.Linear`` children, so whatever looks for linears (PEFT, torchao, pruning) finds them. The
    bias stays under the name it had, where serving engines look for it. The empty ``weight`` is a
    sentinel: a program that does not know this format stops on its shape instead of filling the
    linear with random numbers.

    In the *pivoted* layout (`slimrank.linalg.pivot`) the latents are outputs themselves: those of
    the rows in ``pivots (rank,)``, int32. ``expand.weight (out - rank, rank)`` makes the others, by
    ascending number. The function is the same, with ``rank²`` fewer parameters.

    Parameters
    ----------
    in_features, out_features, rank : int
    bias : bool
    device, dtype : optional
        As for ``nn.Linear``.
    pivoted : bool
        The layout. The pivots of a new layer are its first rows.

    Attributes
    ----------
    on_latent : callable or None
        Called in `forward` with the latents, ``(..., rank)``, before they are expanded: where a
        cache of latents listens. No part of the state.

    Examples
    --------
    >>> layer = LowRankLinear(8, 6, rank=2)
    >>> sorted((name, tuple(t.shape)) for name, t in layer.state_dict().items())
    [('bias', (6,)), ('expand.weight', (6, 2)), ('latent.weight', (2, 8)), ('weight', (0,))]
    >>> layer(torch.ones(3, 8)).shape
    torch.Size([3, 6])
    >>> layer = LowRankLinear(8, 6, rank=2, pivoted=True)
    >>> tuple(layer.expand.weight.shape), layer.pivots.tolist(), tuple(layer(torch.ones(8)).shape)
    ((4, 2), [0, 1], (6,))
    """

    weight: Tensor
    pivots: Tensor
    on_latent: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pivoted: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.pivoted = pivoted
        self.latent = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        with warnings.catch_warnings():
            # pivots may be all rows there are
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            rows = out_features - rank if pivoted else out_features
            self.expand = nn.Linear(rank, rows, bias=False, device=device, dtype=dtype)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        if pivoted:
            self.register_buffer("pivots", torch.arange(rank, dtype=torch.int32, device=device))
            self._rows = RowNumbers()

    @classmethod
    def unfilled(
        cls,
        linear: nn.Linear,
        rank: int,
        device: torch.device | str | None = None,
        pivoted: bool = False,
    ) -> "LowRankLinear":
        """A layer of a linear's sides, dtype and bias, whose factors are still to be loaded.

        Parameters
        ----------
        linear : nn.Linear
        rank : int
        device : optional
            That of the linear if left out.
        pivoted : bool
            The layout.

        Examples
        --------
        >>> LowRankLinear.unfilled(nn.Linear(8, 6, bias=False), 2, "meta").expand.weight.shape
        torch.Size([6, 2])
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            device="meta",  # where nothing is drawn
            dtype=linear.weight.dtype,
            pivoted=pivoted,
        ).to_empty(device=linear.weight.device if device is None else device)
        return layer.requires_grad_(linear.weight.requires_grad).train(linear.training)

    @classmethod
    def from_factors(
        cls, linear: nn.Linear, factors: Factors, pivoted: bool = False
    ) -> "LowRankLinear":
        """Take a linear's place: its device, dtype, bias and mode, with the factors as weights.

        Parameters
        ----------
        linear : nn.Linear
        factors : Factors
            ``left (out, rank)`` and ``right (rank, in)``; cast once, to the linear's dtype.
        pivoted : bool
            Choose pivots, and store the product by them.

        Raises
        ------
        NumericalError
            As `slimrank.linalg.pivot_rows`.
        """
        rank = factors.right.shape[0]
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, rank, bias=False, pivoted=pivoted)
        expand, latent = factors.left, factors.right
        if pivoted:
            chosen = pivot_rows(factors)
            expand, latent = chosen.expand, chosen.latent
            layer.pivots = chosen.pivots.to(linear.weight.device, torch.int32)
        layer.latent.weight = nn.Parameter(latent.to(linear.weight), linear.weight.requires_grad)
        layer.expand.weight = nn.Parameter(expand.to(linear.weight), linear.weight.requires_grad)
        layer.weight = torch.empty_like(linear.weight[:0, 0]).detach()
        layer.bias = linear.bias
        return layer.train(linear.training)

    def factors(self) -> Factors:
        """Views of the stored factors; a pivoted ``left`` is made, with rows of the identity."""
        return Factors(left=self.expansion().detach(), right=self.latent.weight.detach())

    def expansion(self) -> Tensor:
        """The matrix from latents to outputs, ``(out, rank)``, in either layout."""
        weight = self.expand.weight
        if not self.pivoted:
            return weight
        rows = self.row_numbers()
        matrix = weight.new_zeros(self.out_features, self.rank).index_copy(0, rows.others, weight)
        matrix[rows.pivots, torch.arange(self.rank, device=weight.device)] = 1
        return matrix

    def to_linear(self) -> nn.Linear:
        """Multiply the factors out into an ordinary linear of the same function."""
        latent = self.latent.weight
        weight = (in_float64(self.expansion()) @ in_float64(latent)).to(latent)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(weight, latent.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def row_numbers(self) -> Rows:
        """Where latents and other outputs stand; of a pivoted layer only.

        Raises
        ------
        CheckpointError
            If the pivots do not name different rows.
        """
        pivots = self._buffers["pivots"]  # for one token the way by the attribute counts
        assert pivots is not None
        return self._rows.of(pivots, self.out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        latents = call_linear(self.latent, inputs, is_between=True)
        if self.on_latent is not None:
            self.on_latent(latents)
        return self.expand_latents(latents)

    def expand_latents(self, latents: Tensor) -> Tensor:
        """Map latents ``(..., rank)`` to ``(..., out)``: the second half of `forward`."""
        if self.pivoted:
            outputs = expand_into_rows(latents, self.expand, self.row_numbers())
        else:
            outputs = call_linear(self.expand, latents)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """Show the sides, the rank and the layout."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
            f"{', pivoted=True' if self.pivoted else ''}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if self.pivoted:
            self._rows.forget()
            pivots = state_dict.get(f"{prefix}pivots")
            if pivots is not None and not pivots.is_meta:
                check_pivots(pivots, self.out_features, prefix.removesuffix(".") or "the layer")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
