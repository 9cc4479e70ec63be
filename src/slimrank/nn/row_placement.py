"""Where the outputs of a pivoted linear stand: latents in some rows, the others between them."""

from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimrank.errors import CheckpointError
from slimrank.linalg import other_rows
from slimrank.nn.product import HALVES, apply_weight, are_columns, is_free, is_recorded
from slimrank.nn.quick_linear import bare_weight

_MANY_TOKENS = 256
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED: set[tuple[Any, ...]] = set()  # what the kernel has run for
_WITHOUT_KERNEL: list[str] = []  # why it failed once: then it is not tried again


class Rows(NamedTuple):
    """Where outputs stand, int64.

    Attributes
    ----------
    pivots : Tensor of shape (rank,)
        Rows that are latents, in the order of these.
    others : Tensor of shape (out - rank,)
        All other rows, ascending.
    order : Tensor of shape (1, 1, out)
        Where each row is found in latents followed by the others.
    rank : int
    """

    pivots: Tensor
    others: Tensor
    order: Tensor
    rank: int


class RowNumbers:
    """Row numbers that follow from pivots, kept for as long as the pivots are the same.

    Only the pivots are stored in a checkpoint and moved between devices. What follows from them is
    no buffer, since a buffer that no file holds is left unset by loaders that begin on the meta
    device. It is derived when it is asked for and the pivots are another tensor than last time, or
    one that was written to. Copies and pickles begin anew.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Rows] | None = None

    def __reduce__(self) -> tuple[type["RowNumbers"], tuple[()]]:
        return RowNumbers, ()

    def forget(self) -> None:
        """Derive them anew next time."""
        self._kept = None

    def of(self, pivots: Tensor, out_features: int) -> Rows:
        """Row numbers that follow from pivots.

        Parameters
        ----------
        pivots : Tensor of shape (rank,), int32
        out_features : int

        Raises
        ------
        CheckpointError
            As `check_pivots`.

        Notes
        -----
        Inside a graph of ``torch.compile`` versions are out of sight: who writes into pivots in
        place, other than by ``load_state_dict``, calls `forget`.
        """
        kept = self._kept
        is_compiling = torch.compiler.is_compiling()
        if kept is not None and kept[0] is pivots and (is_compiling or kept[1] == _version(pivots)):
            return kept[2]
        if is_compiling:
            return _derived(pivots, out_features)
        if not pivots.is_meta:
            check_pivots(pivots, out_features)
        with torch.inference_mode(False):  # they may be asked for in training later
            rows = _derived(pivots, out_features)
        self._kept = pivots, _version(pivots), rows
        return rows


def _version(pivots: Tensor) -> int:
    """How often it was written to; a tensor of inference mode does not say."""
    return -1 if pivots.is_inference() else pivots._version


def _derived(pivots: Tensor, out_features: int) -> Rows:
    chosen, others = pivots.long(), other_rows(pivots, out_features)
    order = torch.cat([chosen, others]).argsort()
    return Rows(chosen, others, order[None, None], len(pivots))


def check_pivots(pivots: Tensor, out_features: int, name: str = "a pivoted linear") -> None:
    """Refuse pivots that do not name different rows.

    Parameters
    ----------
    pivots : Tensor of shape (rank,)
    out_features : int
    name : str
        Of the linear, for the error.

    Raises
    ------
    CheckpointError
        If they are no int32, or one is out of range or there twice.

    Examples
    --------
    >>> check_pivots(torch.tensor([1, 4, 1], dtype=torch.int32), 6, "o_proj")
    Traceback (most recent call last):
    slimrank.errors.CheckpointError: pivots of o_proj name row 1 twice: the file is damaged
    """
    if pivots.dtype != torch.int32:
        raise CheckpointError(f"pivots of {name} are {pivots.dtype}, not torch.int32")
    rows = pivots.detach().sort().values.tolist()
    strays = [row for row in rows if not 0 <= row < out_features]
    if strays:
        raise CheckpointError(
            f"pivots of {name} name row {strays[0]} of {out_features}: the file is damaged"
        )
    for row, following in pairwise(rows):
        if row == following:
            raise CheckpointError(f"pivots of {name} name row {row} twice: the file is damaged")


def place_rows(latents: Tensor, others: Tensor, rows: Rows) -> Tensor:
    """Put latents and other outputs into their rows.

    Parameters
    ----------
    latents : Tensor of shape (..., rank)
    others : Tensor of shape (..., out - rank)
        Its dtype is that of the outputs.
    rows : Rows

    Returns
    -------
    Tensor of shape (..., out)

    Examples
    --------
    >>> rows = RowNumbers().of(torch.tensor([2, 0], dtype=torch.int32), 3)
    >>> place_rows(torch.tensor([5.0, 6.0]), torch.tensor([7.0]), rows)
    tensor([6., 7., 5.])
    """
    if latents.dtype != others.dtype:
        latents = latents.to(others.dtype)
    if torch.is_grad_enabled():
        outputs: Tensor = _Placement.apply(  # type: ignore[no-untyped-call]
            latents, others, rows.pivots, rows.others
        )
        return outputs
    if not is_recorded() and latents.numel() == rows.rank:
        # one token: a third faster than what is best for many
        outputs = torch.cat((latents, others), -1)
        placed = outputs.take(rows.order)
        return placed if outputs.ndim == placed.ndim else placed.view_as(outputs)
    return copy_rows(latents, others, rows.pivots, rows.others)


def expand_into_rows(latents: Tensor, expand: nn.Module, rows: Rows) -> Tensor:
    """Outputs of a pivoted linear from its latents.

    One token on a GPU takes a single kernel. On a CPU a few tokens are columns, whose rows are
    moved whole; many of them in 16 bits, from few latents, are one product with all rows, since
    moving single numbers would take longer than to multiply by the identity.

    Parameters
    ----------
    latents : Tensor of shape (..., rank)
    expand : nn.Module
        The linear that makes the others.
    rows : Rows

    Returns
    -------
    Tensor of shape (..., out)
    """
    weight = bare_weight(expand)
    if weight is None:
        return place_rows(latents, expand(latents), rows)
    if latents.is_cuda:
        if _is_one_token(latents, rows) and _fits_kernel(weight, latents):
            outputs = _by_kernel(latents, weight, rows)
            if outputs is not None:
                return outputs
    elif latents.numel() != rows.rank:
        if are_columns(latents, weight):
            return _by_columns(latents, weight, rows)
        if _take_all_rows(latents, weight):
            return apply_weight(latents, _all_rows(weight, rows))
    return place_rows(latents, apply_weight(latents, weight), rows)


def _by_columns(latents: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    columns = latents.reshape(-1, rows.rank).t()
    both = torch.cat((columns, weight @ columns))
    outputs = both.index_select(0, rows.order.view(-1)).t().contiguous()
    return outputs.view(*latents.shape[:-1], len(both))


def _take_all_rows(latents: Tensor, weight: Tensor) -> bool:
    """Whether making the matrix, of as many columns as latents, costs less than moving tokens."""
    others, rank = weight.shape
    is_many = latents.numel() >= max(_MANY_TOKENS, rank) * rank
    return is_many and weight.dtype in HALVES and 3 * rank <= others and is_free(latents, weight)


def _all_rows(weight: Tensor, rows: Rows) -> Tensor:
    """The matrix from latents to all outputs, ``(out, rank)``."""
    identity = torch.eye(rows.rank, dtype=weight.dtype)
    return torch.cat((identity, weight)).index_select(0, rows.order.view(-1))


def _is_one_token(latents: Tensor, rows: Rows) -> bool:
    is_eager = not (is_recorded() or torch.is_grad_enabled())
    return is_eager and latents.numel() == rows.rank


def _fits_kernel(weight: Tensor, latents: Tensor) -> bool:
    """Whether it is stored as the kernel reads it: no quantiser's tensor, no other dtype."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and type(latents) is Tensor
    return is_plain and weight.dtype == latents.dtype and weight.dtype in _KERNEL_DTYPES


def _by_kernel(latents: Tensor, weight: Tensor, rows: Rows) -> Tensor | None:
    """One token's outputs by a kernel of its own; None where the common way is to be gone.

    In a CUDA graph it saves what placing costs; launched from Python it costs a little more. So it
    runs where a graph is captured, and once before for each shape, since it is compiled then.
    """
    kind = latents.device.index, weight.shape, weight.dtype, weight.data_ptr() % 16
    is_capturing = torch.cuda.is_current_stream_capturing()
    expand = triton_kernel() if (kind in _COMPILED) == is_capturing else None
    if expand is None:
        return None
    try:
        outputs: Tensor = expand(latents, weight, rows.pivots, rows.others)
    except Exception as error:  # no compiler in the image, a GPU that Triton does not know
        if is_capturing:
            raise
        _WITHOUT_KERNEL.append(f"{type(error).__name__}: {error}")
        return None
    _COMPILED.add(kind)
    return outputs


def triton_kernel() -> Any:
    """What makes and places the rows of one token; None where Triton is not to be had."""
    return None if _WITHOUT_KERNEL else _imported_kernel()


@cache
def _imported_kernel() -> Any:
    try:
        return import_module("slimrank.nn.triton_rows").expand_one_token
    except ImportError:
        return None


def copy_rows(latents: Tensor, others: Tensor, pivots: Tensor, rest: Tensor) -> Tensor:
    """Outputs whose places ``pivots`` hold latents, and ``rest`` all others.

    Parameters
    ----------
    latents : Tensor of shape (..., rank)
    others : Tensor of shape (..., out - rank)
    pivots, rest : Tensor
        Where each of them stands, int64; together every place once.

    Returns
    -------
    Tensor of shape (..., out)

    Examples
    --------
    >>> latents, others = torch.tensor([5.0, 6.0]), torch.tensor([7.0])
    >>> copy_rows(latents, others, torch.tensor([2, 0]), torch.tensor([1]))
    tensor([6., 7., 5.])
    """
    outputs = others.new_empty((*others.shape[:-1], len(pivots) + len(rest)))
    return outputs.index_copy_(-1, pivots, latents).index_copy_(-1, rest, others)


class _Placement(torch.autograd.Function):
    """Each gradient is that of one output: gathered, several times faster than autograd's own."""

    @staticmethod
    def forward(latents: Tensor, others: Tensor, pivots: Tensor, rest: Tensor) -> Tensor:
        return copy_rows(latents, others, pivots, rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, (pivots, rest) = gradients[0], ctx.saved_tensors
        shape = outputs.shape[:-1]
        return (
            outputs.gather(-1, pivots.expand(*shape, -1)),
            outputs.gather(-1, rest.expand(*shape, -1)),
            None,
            None,
        )
