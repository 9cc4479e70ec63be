"""Linears that an engine computes as one (q, k and v; gate and up), each of a rank of its own.

An engine shards and loads; this knows which tensors the checkpoint has, which part of them a
process needs, and how outputs come from inputs. It imports no engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimrank.errors import CheckpointError
from slimrank.linalg import other_rows
from slimrank.nn import check_pivots

KINDS = ("weight", "latent", "expand", "pivots")


@dataclass(frozen=True, slots=True)
class Member:
    """One linear of the checkpoint, and the part of it that one process computes.

    Parameters
    ----------
    name : str
        Full name in the checkpoint.
    shape : tuple of int
        Outputs and inputs of all of it.
    rows, columns : range
        Outputs that are made here, and inputs that arrive here.
    rank : int or None
        None of one that is dense.
    pivoted : bool
        The layout.
    """

    name: str
    shape: tuple[int, int]
    rows: range
    columns: range
    rank: int | None = None
    pivoted: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its tensors in the checkpoint, by kind.

        Examples
        --------
        >>> whole = range(6), range(8)
        >>> Member("fc", (6, 8), *whole).shapes()
        {'weight': (6, 8)}
        >>> Member("fc", (6, 8), *whole, rank=2, pivoted=True).shapes()
        {'weight': (0,), 'latent': (2, 8), 'expand': (4, 2), 'pivots': (2,)}
        """
        if self.rank is None:
            return {"weight": self.shape}
        rows = self.shape[0] - self.rank if self.pivoted else self.shape[0]
        found: dict[str, tuple[int, ...]] = {"weight": (0,)}
        found |= {"latent": (self.rank, self.shape[1]), "expand": (rows, self.rank)}
        return found | ({"pivots": (self.rank,)} if self.pivoted else {})


@dataclass(slots=True)
class FusedLinear:
    """Members in the order of their outputs; first loaded, then `finished`, then called.

    Parameters
    ----------
    members : sequence of Member

    Examples
    --------
    >>> linear = FusedLinear([Member("fc", (2, 3), range(2), range(3), rank=1)])
    >>> linear.load(0, "weight", torch.empty(0))
    >>> linear.load(0, "latent", torch.ones(1, 3))
    >>> linear.missing()
    ['fc.expand.weight']
    >>> linear.load(0, "expand", torch.tensor([[1.0], [2.0]]))
    >>> linear.finished("cpu", torch.float32)(torch.ones(3))
    tensor([3., 6.])
    """

    members: Sequence[Member]
    loaded: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def load(self, number: int, kind: str, tensor: Tensor) -> None:
        """Take one tensor of the checkpoint; keep what is needed here.

        Parameters
        ----------
        number : int
            Of the member.
        kind : {'weight', 'latent', 'expand', 'pivots'}
        tensor : Tensor
            All of it, as it is stored.

        Raises
        ------
        CheckpointError
            If there is to be no such tensor, or one of another shape; or if it was there before.
        """
        member = self.members[number]
        name, wanted = _stored_name(member, kind), member.shapes().get(kind)
        if wanted is None:
            what = "dense" if member.rank is None else f"of rank {member.rank}"
            raise CheckpointError(f"{name} is in the files, but {member.name} is {what}")
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
        if (number, kind) in self.loaded:
            raise CheckpointError(f"{name} is there twice")
        if kind == "pivots":
            check_pivots(tensor, member.shape[0], member.name)
        part = _own_part(member, kind, tensor)
        self.loaded[number, kind] = part.clone() if part.numel() < tensor.numel() else part
        if kind in ("expand", "pivots"):
            self._cut_expansion(number)

    def _cut_expansion(self, number: int) -> None:
        """Of a pivoted member: which rows are needed shows when pivots and rows are there."""
        member, keys = self.members[number], [(number, "expand"), (number, "pivots")]
        if not member.pivoted or len(member.rows) == member.shape[0]:
            return
        if all(key in self.loaded for key in keys):
            rest, pivots = (self.loaded[key] for key in keys)
            others = other_rows(pivots, member.shape[0])
            here = (others >= member.rows.start) & (others < member.rows.stop)
            self.loaded[number, "expand"] = rest[here.to(rest.device)]

    def missing(self) -> list[str]:
        """Names of tensors that were not loaded."""
        return [
            _stored_name(member, kind)
            for number, member in enumerate(self.members)
            for kind in member.shapes()
            if (number, kind) not in self.loaded
        ]

    def finished(self, device: torch.device | str, dtype: torch.dtype) -> "FinishedLinear":
        """What computes; nothing that was loaded is kept here.

        Raises
        ------
        CheckpointError
            If a tensor is missing.
        """
        missing = self.missing()
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors of a linear, such as {missing[0]}"
            )
        low = [number for number, member in enumerate(self.members) if member.rank is not None]
        latents = [self.loaded[number, "latent"].to(device, dtype) for number in low]
        matrices = [
            self.loaded[number, "weight" if member.rank is None else "expand"].to(device, dtype)
            for number, member in enumerate(self.members)
        ]
        order = self._order()
        found = FinishedLinear(
            latent=torch.cat(latents) if latents else None,
            matrices=matrices,
            ranks=[member.rank for member in self.members],
            order=None if order is None else order.to(device),
        )
        self.loaded.clear()
        return found

    def _order(self) -> Tensor | None:
        """Where each output stands in all latents, followed by what each matrix gives."""
        if not any(member.pivoted for member in self.members):
            return None
        place, latents = sum(member.rank or 0 for member in self.members), 0
        found: list[Tensor] = []
        for number, member in enumerate(self.members):
            rows = torch.arange(member.rows.start, member.rows.stop)
            places = torch.full((member.shape[0],), -1)
            if member.pivoted:
                pivots = self.loaded[number, "pivots"].long().cpu()
                places[pivots] = latents + torch.arange(len(pivots))
            others = rows[places[rows] < 0]
            places[others] = place + torch.arange(len(others))
            found.append(places[rows])
            place, latents = place + len(others), latents + (member.rank or 0)
        return torch.cat(found)


class FinishedLinear(nn.Module):
    """Outputs of all members, side by side.

    Parameters
    ----------
    latent : Tensor of shape (sum of ranks, in) or None
        First factors, one above the other; None if all members are dense.
    matrices : sequence of Tensor
        For each member the second factor, of shape (rows, rank), or the dense weight.
    ranks : sequence of int or None
    order : Tensor of shape (out,), int64, or None
        Where outputs stand among latents and what the matrices give; None if no member is pivoted.
    """

    order: Tensor | None

    def __init__(
        self,
        latent: Tensor | None,
        matrices: Sequence[Tensor],
        ranks: Sequence[int | None],
        order: Tensor | None,
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.latent = None if latent is None else nn.Parameter(latent, requires_grad=False)
        self.matrices = nn.ParameterList(nn.Parameter(m, requires_grad=False) for m in matrices)
        self.register_buffer("order", order)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``, without a bias."""
        pieces, latents = [], None
        if self.latent is not None:
            latents = functional.linear(inputs, self.latent)
        start = 0
        for rank, matrix in zip(self.ranks, self.matrices, strict=True):
            given = inputs
            if rank is not None and latents is not None:
                given = latents[..., start : start + rank]
                start += rank
            pieces.append(functional.linear(given, matrix))
        if self.order is None:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        assert latents is not None
        return torch.cat([latents, *pieces], -1).index_select(-1, self.order)


def _stored_name(member: Member, kind: str) -> str:
    return f"{member.name}.{kind}" + (".weight" if kind in ("latent", "expand") else "")


def _own_part(member: Member, kind: str, tensor: Tensor) -> Tensor:
    rows, columns = (slice(x.start, x.stop) for x in (member.rows, member.columns))
    if kind == "latent":
        return tensor[:, columns]
    if kind == "expand" and not member.pivoted:
        return tensor[rows]
    if kind == "weight" and member.rank is None:
        return tensor[rows, columns]
    return tensor
