"""Both factors in the memory of one dense matrix: the "q" rows of AA-SVD's tables.

After Dobi-SVD (AA-SVD, appendix B.4). Of a matrix ``(out, in)`` of rank k, the factors have
``out + in`` rows of k numbers. With ``K = min(out, in)``, the first K rows of each are stored in
eight bits and what is left of the longer one in 16: ``max(out, in)`` rows of k numbers of 16 bits.
So ``k = min(out, in)`` takes the bytes of the dense matrix, and every share has a rank.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from slimrank.errors import NumericalError
from slimrank.linalg.lowrank import Factors
from slimrank.linalg.rounding import round_rows

WIDTH = 2  # bytes of what is not rounded, and of a scale


class Remapped(NamedTuple):
    """Factors of 8 and 16 bits, packed.

    Attributes
    ----------
    packed : Tensor of shape (max(out, in), rank), int16
        In its first ``min(out, in)`` rows two codes each, of ``left`` and of ``right``; below, the
        bits of the longer factor's further rows.
    left_scale, right_scale : Tensor of shape (rank,)
        One for each component, of 16 bits.
    out_features, in_features : int
    dtype : torch.dtype
        Of the further rows; the scales may have been cast to another one.
    """

    packed: Int16[Tensor, "longer rank"]
    left_scale: Float[Tensor, " rank"]
    right_scale: Float[Tensor, " rank"]
    out_features: int
    in_features: int
    dtype: torch.dtype

    def left(self) -> Float[Tensor, "out rank"]:
        """Unpack the first factor, in the dtype of its scales."""
        return self._rows(0, self.left_scale, self.out_features)

    def right(self) -> Float[Tensor, "rank in"]:
        """Unpack the second factor, in the dtype of its scales."""
        return self._rows(1, self.right_scale, self.in_features).mT

    def factors(self) -> Factors:
        """Unpack both."""
        return Factors(left=self.left(), right=self.right())

    def further(self) -> Float[Tensor, "further rank"]:
        """Those rows of the longer factor that have 16 bits."""
        return self.packed[min(self.out_features, self.in_features) :].view(self.dtype)

    def _rows(self, place: int, scale: Tensor, side: int) -> Tensor:
        shorter = min(self.out_features, self.in_features)
        pairs = self.packed[:shorter].contiguous().view(torch.int8).view(shorter, -1, 2)
        rows = pairs[..., place].to(scale.dtype) * scale
        return rows if side == shorter else torch.cat([rows, self.further().to(scale.dtype)])


def remapped_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes of a linear as `remap` stores it, scales included (the paper leaves these out).

    Examples
    --------
    >>> round(remapped_bytes(4096, 4096, 3276) / (2 * 4096 * 4096), 4)  # of the dense matrix
    0.8002
    """
    return WIDTH * rank * max(out_features, in_features) + 2 * WIDTH * rank


def remap(factors: Factors, dtype: torch.dtype = torch.bfloat16) -> Remapped:
    """Round and pack factors as AA-SVD's "q" rows do.

    The authors take a code book of steps that grow with the number (bitsandbytes' dynamic map).
    Here steps are even. Both have one scale for each component of each factor.

    Parameters
    ----------
    factors : Factors
        ``left (out, rank)``, ``right (rank, in)``.
    dtype : torch.dtype
        Of 16 bits: of the rows that are not rounded, and of scales.

    Raises
    ------
    NumericalError
        If an entry is not finite, or beyond the dtype, or this has not 16 bits.

    Examples
    --------
    >>> factors = Factors(torch.tensor([[127.0], [64.0], [0.5]]), torch.tensor([[1.0, -1.0]]))
    >>> packed = remap(factors)
    >>> packed.packed.shape, packed.factors().left.flatten().tolist()
    (torch.Size([3, 1]), [127.0, 64.0, 0.5])
    """
    if dtype.itemsize != WIDTH:
        raise NumericalError(f"cannot pack factors: {dtype} is no type of 16 bits")
    left, right = factors.left, factors.right.mT
    shorter = min(len(left), len(right))
    first, second = (round_rows(part[:shorter].mT, dtype) for part in (left, right))
    pairs = torch.stack([first.codes.mT, second.codes.mT], dim=-1).contiguous()
    further = max(left, right, key=len)[shorter:].to(pairs.device, dtype)
    if not torch.isfinite(further).all():
        raise NumericalError(f"cannot pack factors: an entry is not finite, or beyond {dtype}")
    packed = torch.cat([pairs.view(torch.int16)[..., 0], further.contiguous().view(torch.int16)])
    return Remapped(packed, first.scale, second.scale, len(left), len(right), dtype)
