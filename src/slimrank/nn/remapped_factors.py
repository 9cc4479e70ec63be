"""Factors packed into the memory of one dense matrix: most rows in 8 bits, others in 16."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimrank.errors import CheckpointError
from slimrank.linalg import Factors, Remapped, principal_components, remap
from slimrank.nn.int8_linear import check_scale
from slimrank.nn.low_rank_linear import LowRankLinear

Part = Literal["latent", "expand"]


class RemappedFactors(nn.Module):
    """Both factors of a `LowRankLinear`, as `slimrank.linalg.remap` packs them.

    State-dict keys are ``packed (max(out, in), rank)``, int16, and ``latent_scale (rank,)`` and
    ``expand_scale (rank,)``. All are buffers: nothing here can be trained. A cast changes the
    scales and what is unpacked, never what is packed.

    Parameters
    ----------
    in_features, out_features, rank : int
    stored : torch.dtype
        Of the rows in 16 bits.
    device, dtype : optional
        As for ``nn.Linear``; the dtype is that of the scales and of what is unpacked.

    Examples
    --------
    >>> factors = RemappedFactors(8, 6, 2, torch.bfloat16)
    >>> sorted((name, tuple(t.shape)) for name, t in factors.state_dict().items())
    [('expand_scale', (2,)), ('latent_scale', (2,)), ('packed', (8, 2))]
    >>> factors("latent").shape, factors("expand").shape
    (torch.Size([2, 8]), torch.Size([6, 2]))
    """

    packed: Tensor
    latent_scale: Tensor
    expand_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        stored: torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.stored = stored
        longer = max(in_features, out_features)
        packed = torch.zeros(longer, rank, dtype=torch.int16, device=device)
        self.register_buffer("packed", packed)
        for part in ("latent", "expand"):
            scale = torch.zeros(rank, dtype=dtype or stored, device=device)
            self.register_buffer(f"{part}_scale", scale)

    @classmethod
    def of(cls, factors: Factors, dtype: torch.dtype) -> "RemappedFactors":
        """Round and pack.

        Raises
        ------
        NumericalError
            As `slimrank.linalg.remap`.
        """
        found = remap(factors, dtype)
        rank = found.packed.shape[1]
        module = cls(found.in_features, found.out_features, rank, dtype, "meta")
        module.packed = found.packed
        module.latent_scale, module.expand_scale = found.right_scale, found.left_scale
        return module

    def forward(self, part: Part) -> Tensor:
        """Unpack one factor: ``(rank, in)`` for 'latent', ``(out, rank)`` for 'expand'."""
        remapped = self._remapped()
        return remapped.right() if part == "latent" else remapped.left()

    def check(self, name: str) -> None:
        """Refuse numbers that no packing gives.

        Raises
        ------
        CheckpointError
            If a scale is not finite or negative, or a row in 16 bits is not finite.
        """
        check_scale(self.latent_scale, f"{name}.latent")
        check_scale(self.expand_scale, f"{name}.expand")
        _check_further(self._remapped(), name)

    def extra_repr(self) -> str:
        """Show sides, rank and what the rows in 16 bits are."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"stored={self.stored}"
        )

    def _remapped(self, packed: Tensor | None = None) -> Remapped:
        return Remapped(
            packed=self.packed if packed is None else packed,
            left_scale=self.expand_scale,
            right_scale=self.latent_scale,
            out_features=self.out_features,
            in_features=self.in_features,
            dtype=self.stored,
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        name = prefix.removesuffix(".").removesuffix("remapped").removesuffix(".") or "the layer"
        for part in ("latent", "expand"):
            scale = state_dict.get(f"{prefix}{part}_scale")
            if scale is not None and not scale.is_meta:
                check_scale(scale, f"{name}.{part}")
        packed = state_dict.get(f"{prefix}packed")
        if packed is not None and packed.dtype != torch.int16:
            raise CheckpointError(f"what is packed of {name} is {packed.dtype}, not torch.int16")
        if packed is not None and packed.shape == self.packed.shape and not packed.is_meta:
            _check_further(self._remapped(packed), name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class RemappedFactor(nn.Module):
    """One of two packed factors, in the place of a bias-free ``nn.Linear``; without tensors.

    `weight` is unpacked anew each time it is asked for.

    Parameters
    ----------
    factors : RemappedFactors
        Has the tensors; it is no child of this module, so that they have one name.
    part : {'latent', 'expand'}
    """

    def __init__(self, factors: RemappedFactors, part: Part) -> None:
        super().__init__()
        self.part: Part = part
        self._factors = (factors,)
        sides = factors.in_features, factors.rank, factors.out_features
        self.in_features, self.out_features = sides[:2] if part == "latent" else sides[1:]

    @property
    def weight(self) -> Tensor:
        """The matrix of this factor, ``(out, in)``."""
        matrix: Tensor = self._factors[0](self.part)
        return matrix

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return F.linear(inputs, self.weight)

    def extra_repr(self) -> str:
        """Show the sides."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def remap_factors(layer: LowRankLinear) -> None:
    """Pack both factors of a layer, in place.

    Those of the plain layout are packed as they are. Those of the pivoted one become plain, as
    `slimrank.linalg.principal_components`: the same function, and the packing would gain nothing
    from rows that are left out.

    Parameters
    ----------
    layer : LowRankLinear
        In a dtype of 16 bits.

    Raises
    ------
    NumericalError
        As `slimrank.linalg.remap`.
    """
    factors, dtype = layer.factors(), layer.latent.weight.dtype
    if layer.pivoted:
        factors = principal_components(factors)
    _put(layer, RemappedFactors.of(factors, dtype).to(layer.latent.weight.device))
    if layer.pivoted:
        layer.pivoted = False
        del layer.pivots


def empty_remapped_factors(layer: LowRankLinear, stored: torch.dtype) -> None:
    """Put packed factors that are still to be loaded in the place of a plain layer's own."""
    sides, like = (layer.in_features, layer.out_features), layer.latent.weight
    _put(layer, RemappedFactors(*sides, layer.rank, stored, like.device, like.dtype))


def packed_factors(layer: LowRankLinear) -> RemappedFactors | None:
    """Find the packed factors of a layer; None if they are not packed."""
    found = getattr(layer, "remapped", None)
    return found if isinstance(found, RemappedFactors) else None


def _put(layer: LowRankLinear, factors: RemappedFactors) -> None:
    parts = {
        "remapped": factors,
        "latent": RemappedFactor(factors, "latent"),
        "expand": RemappedFactor(factors, "expand"),
    }
    for name, part in parts.items():
        layer.register_module(name, part.train(layer.training))


def _check_further(remapped: Remapped, name: str) -> None:
    bad = ~torch.isfinite(remapped.further()).all(dim=1)
    if bad.any():
        row = min(remapped.out_features, remapped.in_features) + int(bad.nonzero()[0])
        raise CheckpointError(
            f"what is packed of {name} is not finite in row {row}: the file is damaged"
        )
