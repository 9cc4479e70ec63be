"""Fused linears give what the checkpoint's linears give, whole or in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimrank.errors import CheckpointError
from slimrank.linalg import Factors
from slimrank.nn import LowRankLinear
from slimrank.serving.fused import FusedLinear, Member

INPUTS = 12


def stored(out, rank, pivoted, seed):
    """A linear of the checkpoint, float64."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(INPUTS, out, bias=False, dtype=torch.float64)
    dense.weight.data = torch.randn(out, INPUTS, generator=generator, dtype=torch.float64)
    if rank is None:
        return dense.requires_grad_(False)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, INPUTS, generator=generator, dtype=torch.float64)
    return LowRankLinear.from_factors(dense, Factors(left, right), pivoted).requires_grad_(False)


def tensors(linear):
    """By kind, the last first, as files may have them."""
    if isinstance(linear, nn.Linear):
        return {"weight": linear.weight}
    state = linear.state_dict()
    names = {"latent": "latent.weight", "expand": "expand.weight"}
    names |= {name: name for name in ("weight", "pivots")}
    return {kind: state[name] for kind, name in names.items() if name in state}


def fuse(linears, specs, part=0, parts=1, by_columns=False, turned=False):
    members = []
    for number, (out, rank, pivoted) in enumerate(specs):
        rows, columns = range(out), range(INPUTS)
        if by_columns:
            columns = range(part * INPUTS // parts, (part + 1) * INPUTS // parts)
        else:
            rows = range(part * out // parts, (part + 1) * out // parts)
        members.append(Member(f"l{number}", (out, INPUTS), rows, columns, rank, pivoted))
    fused = FusedLinear(members)
    for number, linear in enumerate(linears):
        found = list(tensors(linear).items())
        for kind, tensor in reversed(found) if turned else found:
            fused.load(number, kind, tensor)
    return fused.finished("cpu", torch.float64)


MEMBERS = st.lists(
    st.tuples(st.sampled_from([4, 8]), st.one_of(st.none(), st.integers(1, 4)), st.booleans()).map(
        lambda x: (x[0], x[1], x[2] and x[1] is not None)
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(MEMBERS, st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9))
def test_parts_together_are_the_whole(specs, parts, turned, seed):
    linears = [stored(*spec, seed + n) for n, spec in enumerate(specs)]
    inputs = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    expected = [linear(inputs) for linear in linears]

    by_rows = [fuse(linears, specs, part, parts, turned=turned)(inputs) for part in range(parts)]
    for number, (out, _, _) in enumerate(specs):
        start = sum(spec[0] for spec in specs[:number]) // parts
        seen = torch.cat([given[:, start : start + out // parts] for given in by_rows], -1)
        torch.testing.assert_close(seen, expected[number])

    width = INPUTS // parts
    pieces = [
        fuse(linears, specs, part, parts, by_columns=True)(
            inputs[:, part * width : (part + 1) * width]
        )
        for part in range(parts)
    ]
    torch.testing.assert_close(torch.stack(pieces).sum(0), torch.cat(expected, -1))


def test_a_tensor_that_is_wrong_or_missing_or_there_twice_is_refused():
    spec = (6, 2, True)
    linear = stored(*spec, 0)
    member = Member("fc", (6, INPUTS), range(6), range(INPUTS), 2, True)
    fused, found = FusedLinear([member]), tensors(linear)
    with pytest.raises(CheckpointError, match=r"lacks 4 tensors .* fc\.weight"):
        fused.finished("cpu", torch.float64)
    with pytest.raises(CheckpointError, match=r"fc\.latent\.weight has shape \(2, 11\), not"):
        fused.load(0, "latent", found["latent"][:, 1:])
    with pytest.raises(CheckpointError, match=r"fc\.weight has shape \(6, 12\), not \(0,\)"):
        fused.load(0, "weight", torch.zeros(6, INPUTS))
    with pytest.raises(CheckpointError, match="name row 9 of 6"):
        fused.load(0, "pivots", torch.tensor([1, 9], dtype=torch.int32))
    for kind in ("weight", "latent", "expand"):
        fused.load(0, kind, found[kind])
    with pytest.raises(CheckpointError, match=r"fc\.expand\.weight is there twice"):
        fused.load(0, "expand", found["expand"])
    assert fused.missing() == ["fc.pivots"]
    dense = FusedLinear([Member("fc", (6, INPUTS), range(6), range(INPUTS))])
    with pytest.raises(CheckpointError, match=r"fc\.latent\.weight is in the files, but fc is den"):
        dense.load(0, "latent", found["latent"])


def test_only_the_own_part_is_kept_and_nothing_when_it_is_finished():
    member = Member("fc", (8, INPUTS), range(4), range(6), 3, True)
    fused = FusedLinear([member])
    found = tensors(stored(8, 3, True, 0))
    for kind in ("weight", "latent", "expand", "pivots"):
        fused.load(0, kind, found[kind])
    here = sum(int(pivot) < 4 for pivot in found["pivots"])
    assert fused.loaded[0, "expand"].shape == (4 - here, 3)
    assert fused.loaded[0, "latent"].untyped_storage().nbytes() == 3 * 6 * 8
    made = fused.finished("cpu", torch.float64)
    assert not fused.loaded
    assert [matrix.shape for matrix in made.matrices] == [(4 - here, 3)]
