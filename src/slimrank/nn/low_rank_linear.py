"""A linear of low rank: two thin linears with a latent between."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimrank.linalg import Factors


class LowRankLinear(nn.Module):
    """``y = expand(latent(x)) + bias``, in the place of an ``nn.Linear``.

    State-dict keys are ``latent.weight (rank, in)``, ``expand.weight (out, rank)``, ``bias (out)``
    if there is one, and ``weight``, empty, of shape ``(0,)``. Both factors are bias-free
    ``nn.Linear`` children, so whatever looks for linears (PEFT, torchao, pruning) finds them. The
    bias stays under the name it had, where serving engines look for it. The empty ``weight`` is a
    sentinel: a program that does not know this format stops on its shape instead of filling the
    linear with random numbers.

    Parameters
    ----------
    in_features, out_features, rank : int
    bias : bool
    device, dtype : optional
        As for ``nn.Linear``.

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
    """

    weight: Tensor
    on_latent: Callable[[Tensor], None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.latent = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_factors(cls, linear: nn.Linear, factors: Factors) -> "LowRankLinear":
        """Take a linear's place: its device, dtype, bias and mode, with the factors as weights.

        Parameters
        ----------
        linear : nn.Linear
        factors : Factors
            ``left (out, rank)`` and ``right (rank, in)``; cast once, to the linear's dtype.
        """
        rank = factors.right.shape[0]
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, rank, bias=False)
        layer.latent.weight = nn.Parameter(
            factors.right.to(linear.weight), linear.weight.requires_grad
        )
        layer.expand.weight = nn.Parameter(
            factors.left.to(linear.weight), linear.weight.requires_grad
        )
        layer.weight = torch.empty_like(linear.weight[:0, 0]).detach()
        layer.bias = linear.bias
        return layer.train(linear.training)

    def factors(self) -> Factors:
        """Views of the stored factors."""
        return Factors(left=self.expand.weight.detach(), right=self.latent.weight.detach())

    def to_linear(self) -> nn.Linear:
        """Multiply the factors out into an ordinary linear of the same function."""
        weight = (self.expand.weight.double() @ self.latent.weight.double()).to(
            self.latent.weight.dtype
        )
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(weight, self.latent.weight.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        latents = self.latent(inputs)
        if self.on_latent is not None:
            self.on_latent(latents)
        return self.expand_latents(latents)

    def expand_latents(self, latents: Tensor) -> Tensor:
        """Map latents ``(..., rank)`` to ``(..., out)``: the second half of `forward`."""
        outputs: Tensor = self.expand(latents)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """Show the sides and the rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
