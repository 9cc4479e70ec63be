"""Fused linears give what the checkpoint's linears give, whole or in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimrank.errors import CheckpointError
from slimrank.linalg import Factors
from slimrank.nn import Int8Linear, LowRankLinear, round_factors
from slimrank.serving.finished import BareLinear
from slimrank.serving.fused import FusedLinear
from slimrank.serving.member import Member

INPUTS = 12


def stored(out, rank, pivoted, coded=False, seed=0):
    """A linear of the checkpoint, float64."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(INPUTS, out, bias=False, dtype=torch.float64)
    dense.weight.data = torch.randn(out, INPUTS, generator=generator, dtype=torch.float64)
    if rank is None:
        return Int8Linear.from_linear(dense) if coded else dense.requires_grad_(False)
    left = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, INPUTS, generator=generator, dtype=torch.float64)
    layer = LowRankLinear.from_factors(dense, Factors(left, right), pivoted).requires_grad_(False)
    if coded:
        round_factors(layer)
    return layer


def loaded(linears, specs, part=0, parts=1, by_columns=False, turned=False):
    members = []
    for number, (out, rank, pivoted, coded) in enumerate(specs):
        rows, columns = range(out), range(INPUTS)
        if by_columns:
            columns = range(part * INPUTS // parts, (part + 1) * INPUTS // parts)
        else:
            rows = range(part * out // parts, (part + 1) * out // parts)
        members.append(Member(f"l{number}", (out, INPUTS), rows, columns, rank, pivoted, coded))
    fused = FusedLinear(members)
    for number, linear in enumerate(linears):
        found = list(linear.state_dict().items())
        for kind, tensor in reversed(found) if turned else found:
            fused.load(number, kind, tensor)
    return fused


def fuse(*arguments, **options):
    return loaded(*arguments, **options).finished("cpu", torch.float64)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([4, 8]),
        st.one_of(st.none(), st.integers(1, 4)),
        st.booleans(),
        st.booleans(),
    ).map(lambda x: (x[0], x[1], x[2] and x[1] is not None, x[3])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(MEMBERS, st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 9))
def test_parts_together_are_the_whole(specs, parts, turned, seed):
    linears = [stored(*spec, seed=seed + n) for n, spec in enumerate(specs)]
    inputs = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1)).double()
    expected = [linear(inputs) for linear in linears]

    by_rows = [fuse(linears, specs, part, parts, turned=turned)(inputs) for part in range(parts)]
    for number, (out, *_) in enumerate(specs):
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
    linear = stored(6, 2, True)
    member = Member("fc", (6, INPUTS), range(6), range(INPUTS), 2, True)
    fused, found = FusedLinear([member]), linear.state_dict()
    with pytest.raises(CheckpointError, match=r"lacks 4 tensors .* fc\.weight"):
        fused.finished("cpu", torch.float64)
    with pytest.raises(CheckpointError, match=r"fc\.latent\.weight has shape \(2, 11\), not"):
        fused.load(0, "latent.weight", found["latent.weight"][:, 1:])
    with pytest.raises(CheckpointError, match=r"fc\.weight has shape \(6, 12\), not \(0,\)"):
        fused.load(0, "weight", torch.zeros(6, INPUTS))
    with pytest.raises(CheckpointError, match="name row 9 of 6"):
        fused.load(0, "pivots", torch.tensor([1, 9], dtype=torch.int32))
    for kind in ("weight", "latent.weight", "expand.weight"):
        fused.load(0, kind, found[kind])
    with pytest.raises(CheckpointError, match=r"fc\.expand\.weight is there twice"):
        fused.load(0, "expand.weight", found["expand.weight"])
    assert fused.missing() == ["fc.pivots"]
    dense = FusedLinear([Member("fc", (6, INPUTS), range(6), range(INPUTS))])
    with pytest.raises(CheckpointError, match=r"fc\.latent\.weight is in the files, but fc is den"):
        dense.load(0, "latent.weight", found["latent.weight"])


def test_codes_that_are_none_are_refused():
    member = Member("fc", (6, INPUTS), range(6), range(INPUTS), 2, coded=True)
    fused, found = FusedLinear([member]), stored(6, 2, False, True).state_dict()
    with pytest.raises(CheckpointError, match=r"codes of fc\.latent are torch\.float64, not"):
        fused.load(0, "latent.codes", found["latent.codes"].double())
    with pytest.raises(CheckpointError, match=r"scale of fc\.expand is not finite or negat"):
        fused.load(0, "expand.scale", -found["expand.scale"])
    with pytest.raises(CheckpointError, match="in the files, but fc is of rank 2, in eight bits"):
        fused.load(0, "latent.weight", torch.zeros(2, INPUTS))


@pytest.mark.parametrize("kinds", [("expand", "pivots"), ("pivots", "expand")])
@pytest.mark.parametrize("coded", [False, True])
def test_only_the_own_part_is_kept_and_nothing_when_it_is_finished(kinds, coded):
    member = Member("fc", (8, INPUTS), range(4), range(6), 3, True, coded)
    fused = FusedLinear([member])
    found = stored(8, 3, True, coded).state_dict()
    for start in ("weight", "latent", *kinds):
        for kind in found:
            if kind.startswith(start):
                fused.load(0, kind, found[kind])
    here = sum(int(pivot) < 4 for pivot in found["pivots"])
    matrix, size = ("codes", 1) if coded else ("weight", 8)
    assert fused.loaded[0, f"expand.{matrix}"].shape == (4 - here, 3)
    assert fused.loaded[0, f"latent.{matrix}"].untyped_storage().nbytes() == 3 * 6 * size
    made = fused.finished("cpu", torch.float64)
    assert not fused.loaded
    assert [tuple(expand.weight.shape) for expand in made.expansions] == [(4 - here, 3)]


OF_EACH_KIND = [
    (8, 2, False, False),
    (4, 3, True, False),
    (4, None, False, False),
    (4, 1, True, True),
]


def test_what_shares_its_inputs_is_one_product_of_the_engine():
    made = []

    def make(weight):
        made.append(tuple(weight.shape))
        return BareLinear(weight)

    linears = [stored(*spec, seed=n) for n, spec in enumerate(OF_EACH_KIND)]
    fused = loaded(linears, OF_EACH_KIND)
    computed = fused.finished("cpu", torch.float64, make)
    assert made == [(5, INPUTS), (8, 2), (1, 3), (4, INPUTS)]
    inputs = torch.ones(2, 3, INPUTS, dtype=torch.float64)
    expected = torch.cat([linear(inputs) for linear in linears], -1)
    torch.testing.assert_close(computed(inputs), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_no_value_is_asked_for_when_it_computes(tokens):
    # a CUDA graph could not wait for one (below, on a GPU); tensors on the meta device have none
    linears = [stored(*spec, seed=n) for n, spec in enumerate(OF_EACH_KIND)]
    computed = loaded(linears, OF_EACH_KIND).finished("cpu", torch.bfloat16).to("meta")
    outputs = computed(torch.empty(tokens, INPUTS, dtype=torch.bfloat16, device="meta"))
    assert (outputs.device.type, tuple(outputs.shape)) == ("meta", (tokens, 20))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cuda_graph_gives_what_it_gives_outside_of_one(tokens):
    linears = [stored(*spec, seed=n) for n, spec in enumerate(OF_EACH_KIND)]
    computed = loaded(linears, OF_EACH_KIND).finished("cpu", torch.float32).cuda()
    inputs = torch.ones(tokens, INPUTS, device="cuda")
    computed(inputs)  # what is made once is made outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = computed(inputs)
    inputs.copy_(torch.randn(tokens, INPUTS))
    graph.replay()
    torch.testing.assert_close(captured, computed(inputs))
