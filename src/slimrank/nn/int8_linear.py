"""Linears whose weights are int8 codes and one scale for each output; activations stay floats."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.errors import CheckpointError
from slimrank.linalg import Factors, RoundedRows, even_columns, round_rows
from slimrank.nn.low_rank_linear import LowRankLinear
from slimrank.nn.product import apply_codes


class Int8Factor(nn.Module):
    """A factor of a `LowRankLinear` in eight bits, in the place of a bias-free ``nn.Linear``.

    State-dict keys are ``codes (out, in)``, int8, and ``scale (out,)``. Both are buffers: nothing
    here can be trained. `weight` is made anew each time it is asked for.

    Parameters
    ----------
    in_features, out_features : int
    device, dtype : optional
        As for ``nn.Linear``; the dtype is that of the scales and of what `weight` gives.

    Examples
    --------
    >>> factor = Int8Factor.rounded(torch.tensor([[1.27, 0.64], [0.0, -2.54]]))
    >>> factor.codes.tolist(), factor(torch.tensor([1.0, 1.0]))
    ([[127, 64], [0, -127]], tensor([ 1.9100, -2.5400]))
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        _register_codes(self, in_features, out_features, device, dtype)

    @classmethod
    def rounded(cls, matrix: Tensor, dtype: torch.dtype | None = None) -> "Int8Factor":
        """Round a matrix ``(out, in)``; scales are of its dtype, or of the one that is given.

        Raises
        ------
        NumericalError
            As `slimrank.linalg.round_rows`.
        """
        return cls.of(round_rows(matrix, dtype))

    @classmethod
    def of(cls, rows: RoundedRows) -> "Int8Factor":
        """Hold codes and scales that are there, without a copy."""
        out_features, in_features = rows.codes.shape
        factor = cls(in_features, out_features, "meta")
        _hold(factor, rows)
        return factor

    @property
    def weight(self) -> Tensor:
        """The matrix that the codes stand for, ``(out, in)``."""
        return RoundedRows(self.codes, self.scale).matrix()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return apply_codes(inputs, self.codes, self.scale)

    def extra_repr(self) -> str:
        """Show the sides."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        _check_stored(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Int8Linear(nn.Module):
    """A dense linear in eight bits.

    State-dict keys are ``codes (out, in)``, int8, ``scale (out,)``, ``bias (out)`` if there is one,
    and ``weight``, empty, of shape ``(0,)``: the sentinel of `LowRankLinear`.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    device, dtype : optional
        As for ``nn.Linear``; the dtype is that of scales and bias.

    Examples
    --------
    >>> layer = Int8Linear(8, 6)
    >>> sorted((name, tuple(t.shape)) for name, t in layer.state_dict().items())
    [('bias', (6,)), ('codes', (6, 8)), ('scale', (6,)), ('weight', (0,))]
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        _register_codes(self, in_features, out_features, device, dtype)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Take a linear's place: its device, dtype, bias and mode.

        Raises
        ------
        NumericalError
            As `slimrank.linalg.round_rows`.
        """
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        _hold(layer, round_rows(linear.weight), linear.weight.device)
        layer.weight = torch.empty_like(linear.weight[:0, 0]).detach()
        layer.bias = linear.bias
        return layer.train(linear.training)

    def matrix(self) -> Tensor:
        """The matrix that the codes stand for, ``(out, in)``."""
        return RoundedRows(self.codes, self.scale).matrix()

    def to_linear(self) -> nn.Linear:
        """Multiply codes by scales into an ordinary linear of the same function."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.matrix(), False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        outputs = apply_codes(inputs, self.codes, self.scale)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """Show the sides."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        _check_stored(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def round_factors(layer: LowRankLinear) -> None:
    """Put both factors of a layer into eight bits, in place.

    In the plain layout the columns of the second factor are made even first
    (`slimrank.linalg.even_columns`); in the pivoted one its rows of the identity forbid it.

    Raises
    ------
    NumericalError
        As `slimrank.linalg.round_rows`.
    """
    latent, expand = layer.latent.weight.detach(), layer.expand.weight.detach()
    dtype, device = latent.dtype, latent.device
    if not layer.pivoted:
        even = even_columns(Factors(left=expand, right=latent))
        latent, expand = even.right, even.left
    for name, matrix in (("latent", latent), ("expand", expand)):
        factor = Int8Factor.rounded(matrix, dtype).to(device)
        layer.register_module(name, factor.train(layer.training))


def empty_int8_factors(layer: LowRankLinear) -> None:
    """Put factors in eight bits that are still to be loaded in the place of a layer's own."""
    for name in ("latent", "expand"):
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        factor = Int8Factor(linear.in_features, linear.out_features, weight.device, weight.dtype)
        layer.register_module(name, factor.train(layer.training))


def has_int8_factors(layer: LowRankLinear) -> bool:
    """Tell whether a layer's factors are in eight bits."""
    return isinstance(layer.get_submodule("latent"), Int8Factor)


def check_codes(codes: Tensor, name: str) -> None:
    """Refuse codes that no rounding gives.

    Raises
    ------
    CheckpointError
        If they are no int8.

    Examples
    --------
    >>> check_codes(torch.tensor([[1, 2]]), "o_proj.latent")
    Traceback (most recent call last):
    slimrank.errors.CheckpointError: codes of o_proj.latent are torch.int64, not torch.int8
    """
    if codes.dtype != torch.int8:
        raise CheckpointError(f"codes of {name} are {codes.dtype}, not torch.int8")


def check_scale(scale: Tensor, name: str) -> None:
    """Refuse scales that no rounding gives.

    Raises
    ------
    CheckpointError
        If one is NaN, infinite or negative.

    Examples
    --------
    >>> check_scale(torch.tensor([0.1, -0.2]), "o_proj.latent")
    Traceback (most recent call last):
    slimrank.errors.CheckpointError: scale of o_proj.latent is not finite or negative in row 1: the file is damaged
    """  # noqa: E501
    bad = ~(torch.isfinite(scale) & (scale >= 0))
    if bad.any():
        raise CheckpointError(
            f"scale of {name} is not finite or negative in row {int(bad.nonzero()[0])}: "
            "the file is damaged"
        )


def _check_stored(state_dict: Mapping[str, Any], prefix: str) -> None:
    name = prefix.removesuffix(".") or "the layer"
    codes, scale = state_dict.get(f"{prefix}codes"), state_dict.get(f"{prefix}scale")
    if codes is not None:
        check_codes(codes, name)
    if scale is not None and not scale.is_meta:
        check_scale(scale, name)


def _hold(
    module: Int8Factor | Int8Linear, rows: RoundedRows, device: torch.device | None = None
) -> None:
    """Put codes and scales in the place of a module's own, without a copy where they are there."""
    module.codes, module.scale = (tensor.to(device=device) for tensor in rows)


def _register_codes(
    module: nn.Module,
    in_features: int,
    out_features: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a module the buffers of a matrix in eight bits, all zero."""
    codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
    module.register_buffer("codes", codes)
    module.register_buffer("scale", torch.zeros(out_features, dtype=dtype, device=device))
