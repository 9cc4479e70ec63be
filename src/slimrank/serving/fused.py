"""Linears that an engine computes as one (q, k and v; gate and up), each of a rank of its own.

An engine shards and loads; this knows which tensors the checkpoint has, which part of them a
process needs, and how outputs come from inputs. It imports no engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimrank.errors import CheckpointError
from slimrank.linalg import RoundedRows, other_rows
from slimrank.nn import Int8Factor, check_codes, check_pivots, check_scale
from slimrank.serving.finished import BareLinear, FinishedLinear, Placing
from slimrank.serving.member import EXPANSIONS, Member

MakeLinear = Callable[[Tensor], nn.Module]
Columns = list[tuple[int, int] | None]


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
    >>> linear.load(0, "latent.weight", torch.ones(1, 3))
    >>> linear.missing()
    ['fc.expand.weight']
    >>> linear.load(0, "expand.weight", torch.tensor([[1.0], [2.0]]))
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
        kind : str
            The last part of the tensor's name: a key of `Member.shapes`.
        tensor : Tensor
            All of it, as it is stored.

        Raises
        ------
        CheckpointError
            If there is to be no such tensor, or one of another shape or that no layer could have;
            or if it was there before.
        """
        member = self.members[number]
        name, wanted = f"{member.name}.{kind}", member.shapes().get(kind)
        if wanted is None:
            raise CheckpointError(f"{name} is in the files, but {member.name} is {_told(member)}")
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
        if (number, kind) in self.loaded:
            raise CheckpointError(f"{name} is there twice")
        _check_values(member, kind, tensor)
        part = member.own_part(kind, tensor)
        self.loaded[number, kind] = part.clone() if part.numel() < tensor.numel() else part
        if member.pivoted and len(member.rows) < member.shape[0]:
            self._cut_expansion(number, EXPANSIONS if kind == "pivots" else (kind,))

    def _cut_expansion(self, number: int, kinds: Sequence[str]) -> None:
        """Of a pivoted member: which rows are needed shows when pivots and rows are there."""
        member, pivots = self.members[number], self.loaded.get((number, "pivots"))
        if pivots is None:
            return
        others = other_rows(pivots, member.shape[0])
        here = (others >= member.rows.start) & (others < member.rows.stop)
        for kind in kinds:
            if kind in EXPANSIONS and (number, kind) in self.loaded:
                rest = self.loaded[number, kind]
                self.loaded[number, kind] = rest[here.to(rest.device)]

    def missing(self) -> list[str]:
        """Names of tensors that were not loaded."""
        return [
            f"{member.name}.{kind}"
            for number, member in enumerate(self.members)
            for kind in member.shapes()
            if (number, kind) not in self.loaded
        ]

    def finished(
        self, device: torch.device | str, dtype: torch.dtype, make: MakeLinear = BareLinear
    ) -> FinishedLinear:
        """What computes; nothing that was loaded is kept here.

        Parameters
        ----------
        device, dtype
            Of the matrices; of codes, the dtype is that of their scales.
        make : callable
            What multiplies by a weight: an engine has kernels, and an order of the numbers, of its
            own.

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
        low = [n for n, member in enumerate(self.members) if member.rank is not None]
        kinds = [[n for n in low if self.members[n].coded == coded] for coded in (False, True)]
        columns = self._latent_columns(kinds)
        placing = self._placing(columns, device)
        latents = [self._matrix(same, "latent.", device, dtype, make) for same in kinds if same]
        expansions = [
            self._matrix([n], "" if member.rank is None else "expand.", device, dtype, make)
            for n, member in enumerate(self.members)
        ]
        self.loaded.clear()
        return FinishedLinear(latents, expansions, columns, placing)

    def _matrix(
        self,
        numbers: Sequence[int],
        prefix: str,
        device: torch.device | str,
        dtype: torch.dtype,
        make: MakeLinear,
    ) -> nn.Module:
        """Matrices of some members, one above the other."""

        def together(kind: str) -> Tensor:
            parts = [self.loaded[number, prefix + kind].to(device) for number in numbers]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        if not self.members[numbers[0]].coded:
            weight = together("weight").to(dtype)
            return make(weight) if len(weight) else BareLinear(weight)
        codes, scale = together("codes").contiguous(), together("scale").to(dtype)
        return Int8Factor.of(RoundedRows(codes, scale))

    def _latent_columns(self, kinds: Sequence[Sequence[int]]) -> Columns:
        """Where the latents of each member are: what is of one kind comes from one product."""
        found: dict[int, tuple[int, int]] = {}
        start = 0
        for number in (number for same in kinds for number in same):
            end = start + (self.members[number].rank or 0)
            found[number], start = (start, end), end
        return [found.get(number) for number in range(len(self.members))]

    def _placing(self, columns: Columns, device: torch.device | str) -> Placing | None:
        """Which latents are outputs here, in which rows, and where all other outputs stand."""
        if not any(member.pivoted for member in self.members):
            return None
        start, latents, rows, others = 0, [], [], []
        for number, (member, at) in enumerate(zip(self.members, columns, strict=True)):
            here = torch.arange(len(member.rows))
            if member.pivoted and at is not None:
                pivots = self.loaded[number, "pivots"].long().cpu() - member.rows.start
                is_here = (pivots >= 0) & (pivots < len(member.rows))
                latents.append(is_here.nonzero().view(-1) + at[0])
                rows.append(pivots[is_here] + start)
                here = here[~torch.isin(here, pivots)]
            others.append(here + start)
            start += len(member.rows)
        chosen = torch.cat(latents)
        is_all = torch.equal(chosen, torch.arange(sum(member.rank or 0 for member in self.members)))
        return Placing(
            None if is_all else chosen.to(device),
            torch.cat(rows).to(device),
            torch.cat(others).to(device),
        )


def _told(member: Member) -> str:
    what = "dense" if member.rank is None else f"of rank {member.rank}"
    return f"{what}, in eight bits" if member.coded else what


def _check_values(member: Member, kind: str, tensor: Tensor) -> None:
    matrix, _, last = f"{member.name}.{kind}".rpartition(".")
    if last == "pivots":
        check_pivots(tensor, member.shape[0], matrix)
    elif last == "scale":
        check_scale(tensor, matrix)
    elif last == "codes":
        check_codes(tensor, matrix)
