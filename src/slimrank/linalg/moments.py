"""Second moments of activations, summed as they stream by.

The layout is PyTorch's: activations are ``(tokens, features)``. "Second moment" means the uncentred
mean of ``x xᵀ`` over tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from slimrank.errors import NumericalError
from slimrank.linalg.exact import float64_device, in_float64

STRIPES = 8
HEAVY = 64.0
SMALL_BLOCK = 64
TILE = 256


@dataclass(frozen=True, slots=True)
class Moments:
    """The second moments of what arrives at a linear.

    ``x`` is the input in the uncompressed model, ``z`` that in the partly compressed one, for the
    same token. Equal streams have no ``shifted`` and no ``drift``.

    Parameters
    ----------
    original : Tensor of shape (in, in) or None, float64
        Mean over tokens of ``x xᵀ``, symmetric. None if nobody asked for it.
    tokens : int
        How many tokens were seen. With none, the moments are zero.
    shifted : Tensor of shape (in, in) or None, float64
        Mean of ``z zᵀ``.
    drift : Tensor of shape (in, in) or None, float64
        Mean of ``(x − z) zᵀ``: the cross moment ``x zᵀ`` of AA-SVD is ``shifted + drift``.
    output_energy : float or None
        Mean of ``‖W x‖²`` for the one linear that is solved; for the anchored loss, where there is
        no ``original`` to tell it.
    ridge : float
        What was added to the diagonals.
    metric : Tensor of shape (out, out) or None, float64
        Mean over tokens of ``g gᵀ``, ``g`` the gradient of the loss (cross-entropy in nats, summed
        over tokens) by the outputs of the one linear that is solved.
    row_weights : Tensor of shape (out,) or None, float64
        For the same linear, sums over each row of its squared weight gradient; mean over sequences.
    magnitudes : Tensor of shape (in,) or None, float64
        Mean over tokens of ``|x|``, feature by feature.
    """

    original: Float[Tensor, "n n"] | None
    tokens: int
    shifted: Float[Tensor, "n n"] | None = None
    drift: Float[Tensor, "n n"] | None = None
    output_energy: float | None = None
    ridge: float = 0.0
    metric: Float[Tensor, "out out"] | None = None
    row_weights: Float[Tensor, " out"] | None = None
    magnitudes: Float[Tensor, " n"] | None = None

    @property
    def arriving(self) -> Float[Tensor, "n n"] | None:
        """Second moment of what arrives: shifted, or original if nothing has shifted."""
        return self.original if self.shifted is None else self.shifted

    @property
    def known_tokens(self) -> int | None:
        """How many directions the tokens can tell apart; None if a ridge settles all of them."""
        return None if self.ridge else self.tokens

    def ridged(self, relative: float) -> "Moments":
        """Add a share of the mean diagonal to all moments, the cross moment included.

        Both streams then hold ``√λ I`` more, so every objective holds ``λ ‖W − W'‖²`` more and
        shrinks towards the weight. On the shifted moment alone it would shrink towards zero. What
        is known of gradients and magnitudes stays as it is.

        Parameters
        ----------
        relative : float
            λ as a share of the mean diagonal of what arrives.

        Examples
        --------
        >>> Moments(torch.diag(torch.tensor([3.0, 1.0])), 5).ridged(0.5).original.tolist()
        [[4.0, 0.0], [0.0, 2.0]]
        """
        if relative == 0 or self.arriving is None:
            return self
        size = relative * float(self.arriving.diagonal().mean())
        eye = torch.eye(len(self.arriving), dtype=self.arriving.dtype, device=self.arriving.device)
        original, shifted = (
            None if moment is None else moment + size * eye
            for moment in (self.original, self.shifted)
        )
        return replace(self, original=original, shifted=shifted, ridge=self.ridge + size)


@dataclass(frozen=True, slots=True)
class Centred:
    """A block of tokens about a centre, but for heavy ones: they are multiplied apart.

    Parameters
    ----------
    tokens : Tensor of shape (tokens, features), float32 or float64
    centre : Tensor of shape (features,), float64
    heavy : Tensor of shape (tokens,), bool
    """

    tokens: Float[Tensor, "tokens features"]
    centre: Float[Tensor, " features"]
    heavy: Bool[Tensor, " tokens"]


class MomentAccumulator:
    """Running sum of ``x xᵀ`` over tokens: float32 products, float64 sums, lower triangle only.

    Three things keep the float32 products honest. Each block of tokens is multiplied on its own and
    added to a float64 sum, so errors do not grow with the number of tokens. Tokens are taken about
    a fixed centre, the mean of the first block's ordinary tokens, which is put back in float64: a
    mean that is large against the spread would round it away. And a token whose squared norm is
    over 64 times the block's median ("massive activations", attention sinks) is multiplied in
    float64, for the same reason; so are blocks of fewer than 64 tokens, which have no median to
    trust.

    Parameters
    ----------
    features : int
        Width of the input.
    device : torch.device or str, optional
        Where the sums live, if it has float64; products are taken where the activations are.

    Examples
    --------
    >>> accumulator = MomentAccumulator(2)
    >>> _ = accumulator.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> accumulator.result().original.tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self._is_centred = False
        device = float64_device(device)
        self._centre = torch.zeros(features, dtype=torch.float64, device=device)
        self._first = torch.zeros(features, dtype=torch.float64, device=device)
        self._second = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "*batch features"]) -> "Centred | None":
        """Add a block of tokens.

        Parameters
        ----------
        inputs : Tensor of shape (..., features)
            Any floating dtype; all leading axes are tokens. Not changed.

        Returns
        -------
        Centred or None
            The block as it was multiplied, for `DriftAccumulator`; None if it has no tokens.

        Raises
        ------
        NumericalError
            If a value is NaN, infinite or too large to square; the sums are then left as they were.
        """
        tokens = inputs.detach().reshape(-1, self.features)
        if tokens.shape[0] == 0:
            return None
        exact = tokens.dtype == torch.float64 or len(tokens) < SMALL_BLOCK
        tokens = in_float64(tokens) if exact else tokens.float()
        if not self._is_centred and len(tokens) >= SMALL_BLOCK:
            require_squarable(tokens)
            self._move_centre(in_float64(typical_mean(tokens)))
        centre = self._centre.to(tokens)
        centred = tokens - centre
        heavy = heavy_tokens(require_squarable(centred))
        rows = heavy.nonzero().flatten()
        if len(rows):
            self._add(in_float64(tokens[rows]) - in_float64(centre))
            centred.index_fill_(0, rows, 0)  # a mask would write all of it
        self._add(centred)
        self.tokens += len(tokens)
        return Centred(centred, self._centre, heavy)

    def _move_centre(self, centre: Float[Tensor, " features"]) -> None:
        """Take what was summed so far about another centre, one that float32 holds exactly."""
        exact = centre.float().to(self._centre)
        shift = self._centre - exact
        self._first, self._second = _about(self._first, self._second, shift, self.tokens)
        self._centre, self._is_centred = exact, True

    def _add(self, tokens: Float[Tensor, "tokens features"]) -> None:
        """Add the lower triangle of ``tokensᵀ tokens``, one stripe of rows at a time."""
        self._first += in_float64(tokens.sum(dim=0)).to(self._first.device)
        edges = [self.features * i // STRIPES for i in range(STRIPES + 1)]
        for start, end in pairwise(edges):
            if start < end:
                add_product(self._second[start:end, :end], tokens[:, start:end], tokens[:, :end])

    def merge(self, other: "MomentAccumulator") -> None:
        """Add what another accumulator saw. Order does not matter beyond rounding."""
        if other.features != self.features:
            raise ValueError(f"cannot merge {other.features} features into {self.features}")
        if not self._is_centred and other._is_centred:
            self._move_centre(other._centre)
        shift = other._centre.to(self._centre) - self._centre
        first, second = other._first.to(shift), other._second.to(shift)
        if shift.any():
            first, second = _about(first, second, shift, other.tokens)
        self._first += first
        self._second += second
        self.tokens += other.tokens

    def result(self) -> Moments:
        """Mean over tokens, with the upper triangle filled in."""
        return self._mean(self._second.clone())

    def taken(self) -> Moments:
        """The same in the memory of the sums, which are used up: of wide inputs there is much."""
        second, self._second = self._second, self._second.new_empty(0, 0)
        return self._mean(second)

    def _mean(self, second: Tensor) -> Moments:
        half = self._first + self.tokens * self._centre / 2
        full = second.addr_(half, self._centre).addr_(self._centre, half)
        full.div_(max(self.tokens, 1))
        for start in range(0, self.features, TILE):
            end = min(start + TILE, self.features)
            full[start:end, end:] = full[end:, start:end].mT
            corner = full[start:end, start:end].tril()
            full[start:end, start:end] = corner + corner.tril(-1).mT
        return Moments(original=full, tokens=self.tokens)


def _about(first: Tensor, second: Tensor, shift: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sums of ``x`` and ``x xᵀ`` when every ``x`` moves by a shift."""
    half = first + tokens * shift / 2
    moved = torch.addr(second, half, shift).addr_(shift, half)
    return first + tokens * shift, moved


def require_squarable(tokens: Tensor) -> Tensor:
    """Norms of tokens; refuse what would make the sums infinite, or worse."""
    sizes: Tensor = torch.linalg.vector_norm(tokens, dim=1)
    norms = sizes.square()
    if not torch.isfinite(norms.sum()):
        bad = int((~torch.isfinite(norms)).sum())
        raise NumericalError(
            f"{bad} of {len(norms)} activations are NaN, infinite or too large to square"
        )
    return sizes


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``leftᵀ right`` to float64 sums; what is float64 itself needs no product of its own."""
    if left.dtype == sums.dtype and left.device == sums.device:
        sums.addmm_(left.mT, right)
    else:
        with whole_float32():
            product = left.mT @ right
        sums.add_(product.to(sums.device))


@contextmanager
def whole_float32() -> Iterator[None]:
    """Multiply float32 as it is, also where a caller has let torch round it to TF32 or bfloat16.

    Examples
    --------
    >>> torch.set_float32_matmul_precision("high")
    >>> with whole_float32():
    ...     torch.backends.cuda.matmul.fp32_precision
    'ieee'
    >>> torch.backends.cuda.matmul.fp32_precision
    'tf32'
    >>> torch.set_float32_matmul_precision("highest")
    """
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    if not {"tf32", "bf16"} & set(before):
        yield
        return
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            is_given = precision != getattr(
                torch.backends, "fp32_precision", None
            )  # else it follows that one
            backend.fp32_precision = precision if is_given else "none"


def heavy_tokens(norms: Tensor) -> Tensor:
    """Tokens whose squared norm is far above the median."""
    return norms.square() > HEAVY * norms.median().square()


def typical_mean(tokens: Tensor) -> Tensor:
    """Mean of the tokens that are not heavy."""
    heavy = heavy_tokens(torch.linalg.vector_norm(tokens, dim=1))
    return tokens.mean(dim=0) if not heavy.any() else tokens[~heavy].mean(dim=0)
