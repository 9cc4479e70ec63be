"""Rows of a pivoted linear on a GPU: one kernel makes them and puts them in their places.

Imported where there is a GPU and Triton, which comes with CUDA builds of torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, COPIED = 4, 512, 1024


@triton.jit  # type: ignore[untyped-decorator]
def _expanding(  # type: ignore[no-untyped-def]
    latents,
    weight,
    pivots,
    others,
    outputs,
    rank,
    rest,
    rows: tl.constexpr,
    columns: tl.constexpr,
    copied: tl.constexpr,
):
    """Outputs of the only token: some rows by the product, some of the latents as they are."""
    part, products = tl.program_id(0), tl.cdiv(rest, rows)
    if part < products:
        row = part * rows + tl.arange(0, rows)
        total = tl.zeros((rows, columns), tl.float32)
        for start in range(0, rank, columns):
            column = start + tl.arange(0, columns)
            inside = (row[:, None] < rest) & (column[None, :] < rank)
            found = tl.load(weight + row[:, None] * rank + column[None, :], inside, 0.0)
            latent = tl.load(latents + column, column < rank, 0.0)
            total += found.to(tl.float32) * latent.to(tl.float32)[None, :]
        place = tl.load(others + row, row < rest, 0)
        tl.store(outputs + place, tl.sum(total, 1), row < rest)
    else:
        moved = (part - products) * copied + tl.arange(0, copied)
        kept = tl.load(latents + moved, moved < rank, 0.0)
        its_row = tl.load(pivots + moved, moved < rank, 0)
        tl.store(outputs + its_row, kept, moved < rank)


def expand_one_token(latents: Tensor, weight: Tensor, pivots: Tensor, others: Tensor) -> Tensor:
    """Make the outputs of one token and put them into their rows, in one kernel; float32 sums.

    Parameters
    ----------
    latents : Tensor of shape (..., rank)
        Of one token.
    weight : Tensor of shape (out - rank, rank)
    pivots : Tensor of shape (rank,), int64
    others : Tensor of shape (out - rank,), int64

    Returns
    -------
    Tensor of shape (..., out)
    """
    rest, rank = weight.shape
    latents, weight = latents.contiguous(), weight.contiguous()
    outputs = latents.new_empty((*latents.shape[:-1], rank + rest))
    with torch.cuda.device_of(outputs):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(rest, ROWS) + triton.cdiv(rank, COPIED),)
        _expanding[grid](
            latents, weight, pivots, others, outputs, rank, rest, ROWS, COLUMNS, COPIED
        )
    return outputs
