"""Lazy keys and values against the tensors that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv

from slimrank.nn import LowRankLinear
from slimrank.nn.latent_states import LatentKeys, LatentStates, LatentValues
from tolerances import TOLERANCE

BATCH, HEADS, TOKENS, DIM, RANK = 2, 2, 11, 6, 5


def normal(seed: int, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


class Rotation:
    """A path from latents to keys with a factor and a rotation of sorts."""

    factor = normal(1, HEADS * DIM, RANK)

    def rebuild(self, latents, positions):
        keys = (latents @ self.factor.mT).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return keys * positions[0][:, None] + keys.flip(-1) * positions[1][:, None]


def lazy_keys(monkeypatch) -> LatentStates:
    monkeypatch.setattr("slimrank.nn.latent_states.TILE", 4)
    keys = LatentKeys.__new__(LatentKeys)
    keys._path, keys._latents = Rotation(), normal(2, BATCH, TOKENS, RANK)
    keys._positions = normal(3, 1, TOKENS, DIM), normal(4, 1, TOKENS, DIM)
    keys.shape = (BATCH, HEADS, TOKENS, DIM)
    keys.dtype, keys.device = torch.float64, torch.device("cpu")
    return LatentStates(keys)


def lazy_values(bias=True, heads=HEADS, pivoted=False) -> LatentStates:
    linear = LowRankLinear(8, HEADS * DIM, RANK, bias=bias, dtype=torch.float64, pivoted=pivoted)
    if pivoted:
        linear.pivots = torch.tensor([10, 0, 7, 5, 2], dtype=torch.int32)
    for seed, parameter in enumerate(linear.parameters()):
        parameter.data = normal(5 + seed, *parameter.shape)
    like = normal(0, BATCH, heads, 1, DIM)
    return LatentStates(
        LatentValues(linear.requires_grad_(False), normal(9, BATCH, TOKENS, RANK), like)
    )


def same(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape
    assert type(got) is Tensor
    error = (got - expected).norm() / expected.norm()
    return bool(error <= 10 * TOLERANCE["forward", torch.float64])


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Counts what is expanded."""
    seen = []
    for kind in (LatentKeys, LatentValues):
        whole = kind.dense
        monkeypatch.setattr(
            kind, "dense", lambda self, whole=whole: (seen.append(1), whole(self))[1]
        )
    return seen


def test_what_is_known_without_expansion(monkeypatch, count):
    states = lazy_keys(monkeypatch)
    assert states.shape == (BATCH, HEADS, TOKENS, DIM) == states.size()
    assert (states.shape[-2], states.size(-1), states.ndim, len(states)) == (TOKENS, DIM, 4, BATCH)
    assert states.dtype == torch.float64
    assert states.device.type == "cpu"
    assert not states.is_cuda
    assert states.contiguous() is states
    repeated = repeat_kv(states, 3)
    assert isinstance(repeated, LatentStates)
    assert repeated.shape == (BATCH, HEADS * 3, TOKENS, DIM)
    for turned in (repeated.transpose(2, 3), repeated.transpose(-1, -2), repeated.mT):
        assert isinstance(turned, LatentStates)
        assert turned.shape == (BATCH, HEADS * 3, DIM, TOKENS)
    assert isinstance(states[:, :, None], LatentStates)
    assert count == []


def test_everything_else_is_expanded(monkeypatch, count):
    states = lazy_keys(monkeypatch)
    dense = states.dense()
    steps = [
        lambda x: x + 1,
        lambda x: x[:, :, 2:5],
        lambda x: x[:, :, None, 1:],
        lambda x: x[:, None],
        lambda x: x[0],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1, 3),
        lambda x: x.reshape(BATCH, -1, TOKENS),
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
        lambda x: x[:, :, None].reshape(BATCH, HEADS, TOKENS, DIM) * 1,
        lambda x: x[:, :, None].transpose(3, 4) * 1,
        lambda x: repeat_kv(x, 2) * 1,
        lambda x: repeat_kv(x, 2).mT * 1,
        lambda x: x.mT.reshape(BATCH, HEADS, TOKENS, DIM),
        lambda x: x.mT[:, :, None] * 1,
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x.to(torch.float64, copy=True),
        lambda x: x.view(-1),
        lambda x: torch.repeat_interleave(x, 2, dim=1),
        lambda x: torch.einsum("bhtd,bhsd->bhts", x, x),
        lambda x: x @ x.mT,
        lambda x: torch.ops.aten.mul.Tensor(x, 2),
    ]
    for number, step in enumerate(steps):
        before = len(count)
        assert same(step(states), step(dense)), number
        assert len(count) > before, number


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("queries", [1, 2])
def test_scores_and_sums_stay_in_latents(monkeypatch, count, queries, pivoted):
    keys, values = lazy_keys(monkeypatch), lazy_values(pivoted=pivoted)
    dense_keys, dense_values = keys.dense(), values.dense()
    count.clear()
    for copies in (1, 3):
        query = normal(20, BATCH, HEADS * copies, queries, DIM)
        scores = torch.matmul(query, repeat_kv(keys, copies).transpose(2, 3))
        assert same(scores, query @ repeat_kv(dense_keys, copies).mT)
        weights = normal(21, *scores.shape)
        sums = weights @ repeat_kv(values, copies)
        assert same(sums, weights @ repeat_kv(dense_values, copies))
        assert same(weights.matmul(repeat_kv(values, copies)), sums)
    assert count == []


@pytest.mark.parametrize("pivoted", [False, True])
def test_heads_that_the_architecture_copied(count, pivoted):
    values = lazy_values(heads=2 * HEADS, pivoted=pivoted)
    dense = values.dense()
    assert torch.equal(dense[:, 0], dense[:, 1])
    count.clear()
    weights = normal(22, BATCH, 2 * HEADS, 1, TOKENS)
    assert same(weights @ values, weights @ dense)
    assert count == []


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "blind", "blind float"])
def test_attention_with_masks(monkeypatch, count, bias, mask, pivoted):
    keys, values = lazy_keys(monkeypatch), lazy_values(bias, pivoted=pivoted)
    dense = keys.dense(), values.dense()
    allowed = normal(30, BATCH, 1, 2, TOKENS) > 0
    allowed[..., 0] = True
    if mask.startswith("blind"):
        allowed[1, :, 1] = False
    masks = {
        "none": None,
        "per head": normal(31, BATCH, 4, 2, TOKENS) > -1,
        "float": normal(32, BATCH, 1, 2, TOKENS),
        "blind float": torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(
            ~allowed, -torch.inf
        ),
    }
    query, chosen = normal(33, BATCH, 4, 2, DIM), masks.get(mask, allowed)
    count.clear()
    attend = F.scaled_dot_product_attention
    for scale in (None, 0.7):
        expected = attend(query, *(repeat_kv(d, 2) for d in dense), attn_mask=chosen, scale=scale)
        lazy = attend(query, repeat_kv(keys, 2), repeat_kv(values, 2), chosen, scale=scale)
        assert same(lazy, expected)
        gqa = attend(query, keys, values, attn_mask=chosen, scale=scale, enable_gqa=True)
        assert same(gqa, expected)
    if mask.startswith("blind"):
        assert (lazy[1, :, 1] == 0).all()
    assert count == []


def test_one_head_for_all_queries(monkeypatch, count):
    keys = lazy_keys(monkeypatch)
    query = normal(40, BATCH, HEADS, 1, DIM)
    with pytest.raises(RuntimeError, match="must match"):
        torch.matmul(normal(41, BATCH, 3, 1, DIM), keys.mT)
    count.clear()
    assert same(query @ keys.mT, query @ keys.dense().mT)
    assert len(count) == 1


def test_many_queries_causal_masks_and_dropout_expand(monkeypatch, count):
    keys, values = lazy_keys(monkeypatch), lazy_values()
    dense = keys.dense(), values.dense()
    attend = F.scaled_dot_product_attention
    many, few = normal(50, BATCH, HEADS, 40, DIM), normal(51, BATCH, HEADS, 3, DIM)
    for query, options in ((many, {}), (few, {"is_causal": True})):
        count.clear()
        assert same(attend(query, keys, values, **options), attend(query, *dense, **options))
        assert len(count) == 2
    count.clear()
    attend(few, keys, values, dropout_p=1.0)
    assert len(count) == 2
    weights = normal(52, BATCH, HEADS, 40, TOKENS)
    assert same(weights @ values, weights @ dense[1])
    assert len(count) == 3


def test_pivots_that_are_elsewhere_are_not_looked_at(count):
    values = lazy_values(pivoted=True)
    linear = values.source._linear
    assert values.source.can_mix()
    linear.pivots = linear.pivots.to("meta")
    assert not values.source.can_mix()


def test_a_factor_that_is_no_plain_matrix_is_used_as_it_is(count):
    values = lazy_values()
    linear = values.source._linear
    bias = linear.bias.view(HEADS, 1, DIM)
    doubled = 2 * (values.dense() - bias) + bias

    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    linear.expand.__class__ = Doubled
    weights = normal(60, BATCH, HEADS, 1, TOKENS)
    count.clear()
    assert same(weights @ values, weights @ doubled)
    assert len(count) == 1


def test_scores_of_half_precision_are_as_exact_as_sdpa(monkeypatch):
    keys, values = lazy_keys(monkeypatch), lazy_values()
    query = 8 * normal(70, BATCH, HEADS, 1, DIM)
    exact = F.scaled_dot_product_attention(query, keys.dense(), values.dense())
    for states in (keys, values):
        source = states.source
        source._latents, source.dtype = source._latents.bfloat16(), torch.bfloat16
    keys.source._path.factor = Rotation.factor.bfloat16()
    keys.source._positions = tuple(part.bfloat16() for part in keys.source._positions)
    values.source._linear.bfloat16()
    lazy = F.scaled_dot_product_attention(
        query.bfloat16(), LatentStates(keys.source), LatentStates(values.source)
    )
    assert lazy.dtype == torch.bfloat16
    dense = F.scaled_dot_product_attention(
        query.bfloat16(), keys.source.dense(), values.source.dense()
    )
    error = (lazy.double() - exact).norm()
    assert error <= 1.5 * (dense.double() - exact).norm()
