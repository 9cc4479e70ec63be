from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError
from slimrank.linalg import (
    Decomposition,
    DriftAccumulator,
    Factors,
    MomentAccumulator,
    Moments,
    anchored_loss,
    decompose_anchored,
    decompose_outputs,
    output_loss,
)
from tolerances import TOLERANCE

LOSS = TOLERANCE["loss", torch.float64]
WEIGHTS = TOLERANCE["weights", torch.float64]
LINALG = TOLERANCE["linalg", torch.float64]
EXCESS = TOLERANCE["excess", torch.float64]

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(2, 9)
relaxed = settings(deadline=None, max_examples=25)

Streams = tuple[torch.Tensor, torch.Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def diagonal(*entries: float) -> torch.Tensor:
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def streams_of(seed: int, tokens: int, features: int) -> Streams:
    """Features that differ in size by up to 10; the shifted ones turned, shrunk and noisy."""
    sizes = 10 ** torch.rand(features, generator=generator(seed), dtype=torch.float64)
    x = normal(seed + 1, tokens, features) * sizes
    turned = x @ normal(seed + 2, features, features) / features
    return x, 0.8 * x + 0.3 * turned + 0.3 * normal(seed + 3, tokens, features) * sizes


def many(features: int) -> int:
    return 3 * features + 5


def moments_of(streams: Streams) -> Moments:
    x, z = streams
    tokens = len(x)
    return Moments(x.mT @ x / tokens, tokens, z.mT @ z / tokens, (x - z).mT @ z / tokens)


def measured_loss(
    weight: torch.Tensor, dense: torch.Tensor, streams: Streams, anchor: float = 1.0
) -> float:
    """What the loss is by definition: token by token, no moment anywhere."""
    x, z = streams
    wanted = (anchor * x + (1 - anchor) * z) @ weight.mT
    return float((wanted - z @ dense.mT).square().sum(dim=1).mean())


def optimal_losses(weight: torch.Tensor, streams: Streams, anchor: float = 1.0) -> list[float]:
    """Eckart and Young on what the span of the shifted tokens holds of the wanted outputs."""
    x, z = streams
    wanted = (anchor * x + (1 - anchor) * z) @ weight.mT / len(x) ** 0.5
    columns, sizes, _ = torch.linalg.svd(z, full_matrices=False)
    span = columns[:, sizes > 1e-10 * sizes[0]]
    held = span @ (span.mT @ wanted)
    floor = float((wanted - held).square().sum())
    values = torch.linalg.svdvals(held)
    return [floor + float(values[rank:].square().sum()) for rank in range(min(weight.shape) + 1)]


def best_map(weight: torch.Tensor, streams: Streams) -> torch.Tensor:
    x, z = streams
    return torch.linalg.lstsq(z, x @ weight.mT).solution.mT


def rounding_scale(solved: Decomposition, moments: Moments) -> float:
    """What the rounding of the losses is relative to: the terms that were summed.

    Where tokens are few the best map is large in faint directions, and its energy cancels.
    """
    assert moments.shifted is not None
    terms = solved.target.square().sum() * torch.linalg.matrix_norm(moments.shifted)
    return max(float(terms), solved.energy)


def has_gap(solved: Decomposition, rank: int) -> bool:
    values = solved.singular_values
    following = float(values[rank]) if rank < len(values) else 0.0
    return float(values[rank - 1]) - following > 1e-3 * float(values[0])


# by hand


def test_two_features_by_hand():
    """The first feature arrives halved, the second as it was: the map doubles the first column."""
    moments = Moments(
        original=diagonal(4, 1), tokens=9, shifted=diagonal(1, 1), drift=diagonal(1, 0)
    )
    solved = decompose_anchored(diagonal(3, 5), moments)
    assert solved.target.tolist() == [[6.0, 0.0], [0.0, 5.0]]
    assert solved.singular_values.tolist() == pytest.approx([6.0, 5.0])
    assert [solved.loss(rank) for rank in range(3)] == pytest.approx([61.0, 25.0, 0.0], abs=1e-12)
    assert solved.floor == 0.0
    assert solved.truncate(1).dense().tolist() == [[6.0, 0.0], [0.0, 0.0]]


def test_three_features_with_a_floor_by_hand():
    """x = 2 z in the first, x = z in the second; the third's x has nothing to do with its z.

    Outputs 1·x₁, 3·x₂, 2·x₃ have energies 4, 9, 4; of the last nothing can be had from z.
    """
    moments = Moments(
        original=diagonal(4, 1, 1), tokens=9, shifted=diagonal(1, 1, 1), drift=diagonal(1, 0, -1)
    )
    solved = decompose_anchored(diagonal(1, 3, 2), moments)
    assert torch.equal(solved.target, diagonal(2, 3, 0))
    assert solved.floor == pytest.approx(4.0)
    losses = [solved.loss(rank) for rank in range(4)]
    assert losses == pytest.approx([17.0, 8.0, 4.0, 4.0], abs=1e-12)
    assert torch.equal(solved.truncate(2).dense(), diagonal(2, 3, 0))
    # half way: the target is (x + z) / 2, so 1.5 z₁, z₂, and half of x₃ + z₃
    half = decompose_anchored(diagonal(1, 3, 2), moments, 0.5)
    assert torch.equal(half.target, diagonal(1.5, 3, 1))
    assert half.floor == pytest.approx(1.0)


# against the paper and the definition


def paper_solution(
    weight: torch.Tensor, streams: Streams, root: torch.Tensor, rank: int
) -> tuple[torch.Tensor, float]:
    """Theorem 3.2 as it is printed: M = W C L⁻ᵀ, W' = SVD_k(M) L⁻¹, and the loss with them."""
    x, z = (stream.mT / len(stream) ** 0.5 for stream in streams)
    inverse = torch.linalg.inv(root)
    seen = weight @ (x @ z.mT) @ inverse.mT
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    found = (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse
    loss = (weight @ x).square().sum() - seen.square().sum() + values[rank:].square().sum()
    return found, float(loss)


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_loss_and_map_are_those_of_the_paper_with_any_root(out, inner, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, many(inner), inner)
    moments = moments_of(streams)
    solved = decompose_anchored(weight, moments)
    eigenvalues, vectors = torch.linalg.eigh(moments.shifted)
    cholesky = torch.linalg.cholesky(moments.shifted)
    turn = torch.linalg.qr(normal(seed + 2, inner, inner)).Q
    for root in (cholesky, vectors * eigenvalues.sqrt(), cholesky @ turn):
        for rank in range(1, min(out, inner) + 1):
            dense, loss = paper_solution(weight, streams, root, rank)
            slack = LOSS * solved.energy
            assert solved.loss(rank) == pytest.approx(loss, abs=slack)
            assert measured_loss(weight, dense, streams) == pytest.approx(loss, abs=slack)
            if has_gap(solved, rank):
                torch.testing.assert_close(
                    solved.truncate(rank).dense(), dense, rtol=0, atol=WEIGHTS * float(dense.norm())
                )


@given(
    out=SIDES,
    inner=SIDES,
    tokens=st.integers(1, 25),
    seed=SEEDS,
    anchor=st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    dead=st.integers(0, 2),
)
@relaxed
def test_losses_are_those_on_the_tokens_and_the_least(out, inner, tokens, seed, anchor, dead):
    """However few the tokens, and with dead channels: the spectrum, the factors and the tokens."""
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    streams[1][:, :dead] = 0
    assume(bool(streams[1].any()))
    moments = moments_of(streams)
    solved = decompose_anchored(weight, moments, anchor)
    for tensor in (solved.basis, solved.singular_values, solved.target):
        assert bool(torch.isfinite(tensor).all())
    best = optimal_losses(weight, streams, anchor)
    slack = LINALG * rounding_scale(solved, moments)
    assert solved.energy == pytest.approx(best[0], abs=slack)
    for rank in range(min(out, inner) + 1):
        factors = solved.truncate(rank)
        measured = measured_loss(weight, factors.dense(), streams, anchor)
        assert measured == pytest.approx(best[rank], abs=slack)
        assert solved.loss(rank) == pytest.approx(measured, abs=slack)
        assert anchored_loss(weight, factors, moments, anchor) == pytest.approx(measured, abs=slack)


@given(out=SIDES, inner=SIDES, rank=st.integers(1, 4), tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_the_loss_of_any_factors_is_the_mean_over_tokens(out, inner, rank, tokens, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    factors = Factors(normal(seed + 2, out, rank), normal(seed + 3, rank, inner))
    for anchor in (0.0, 0.3, 1.0, 1.2):
        expected = measured_loss(weight, factors.dense(), streams, anchor)
        found = anchored_loss(weight, factors, moments_of(streams), anchor)
        assert found == pytest.approx(expected, rel=1e-9)


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_no_perturbation_and_no_competitor_does_better(out, inner, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, many(inner), inner)
    solved = decompose_anchored(weight, moments_of(streams))
    slack = LOSS * solved.energy
    for rank in range(1, min(out, inner) + 1):
        factors, least = solved.truncate(rank), solved.loss(rank)
        for size in (1e-3, 0.1, 1.0):
            moved = (factors.left + size * normal(seed + 2, out, rank)) @ (
                factors.right + size * normal(seed + 3, rank, inner)
            )
            assert measured_loss(weight, moved, streams) >= least - slack
        columns = torch.linalg.qr(normal(seed + 4, out, rank)).Q
        for target in (solved.target, weight):
            projected = columns @ (columns.mT @ target)
            assert measured_loss(weight, projected, streams) >= least - slack


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_full_rank_is_least_squares_and_no_worse_than_the_weight(out, inner, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, many(inner), inner)
    solved = decompose_anchored(weight, moments_of(streams))
    expected = best_map(weight, streams)
    rank = min(out, inner)
    size = float(expected.norm())
    dense = solved.truncate(rank).dense()
    torch.testing.assert_close(dense, expected, rtol=0, atol=WEIGHTS * size)
    floor = measured_loss(weight, expected, streams)
    assert solved.floor == pytest.approx(floor, abs=LOSS * solved.energy)
    assert solved.loss(rank) <= measured_loss(weight, weight, streams)


# the objectives beside each other


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 25), seed=SEEDS)
@relaxed
def test_equal_streams_are_the_input_aware_problem_to_the_bit(out, inner, tokens, seed):
    weight, (x, _) = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = Moments(x.mT @ x / tokens, tokens)
    plain = decompose_outputs(weight, moments.original, tokens)
    factors = plain.truncate(1)
    told_apart = replace(moments, shifted=moments.original)
    still = replace(told_apart, drift=torch.zeros_like(moments.original))
    for same in (moments, told_apart):
        found = decompose_anchored(weight, same)
        assert torch.equal(found.basis, plain.basis)
        assert torch.equal(found.target, plain.target)
        assert torch.equal(found.singular_values, plain.singular_values)
        assert found.floor == 0.0
        loss = anchored_loss(weight, factors, same)
        assert loss == output_loss(weight, factors, moments.original)
    zero = decompose_anchored(weight, still)
    assert torch.equal(zero.target, weight)
    assert torch.equal(zero.truncate(1).dense(), factors.dense())
    assert zero.floor <= LOSS * plain.energy


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 25), seed=SEEDS)
@relaxed
def test_no_anchor_is_the_shift_aware_problem_to_the_bit(out, inner, tokens, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = moments_of(streams)
    plain = decompose_outputs(weight, moments.shifted, tokens)
    found = decompose_anchored(weight, moments, 0.0)
    assert torch.equal(found.basis, plain.basis)
    assert torch.equal(found.target, weight)
    assert found.floor == 0.0
    factors = plain.truncate(1)
    loss = anchored_loss(weight, factors, moments, 0.0)
    assert loss == output_loss(weight, factors, moments.shifted)


@given(out=SIDES, inner=SIDES, seed=SEEDS, anchor=st.floats(0.05, 1.0))
@relaxed
def test_an_anchor_between_is_the_objective_of_the_mixed_stream(out, inner, seed, anchor):
    """The target α x + (1 − α) z is a stream like any other; the anchored problem of that one."""
    weight, (x, z) = normal(seed, out, inner), streams_of(seed + 1, many(inner), inner)
    mixed = anchor * x + (1 - anchor) * z
    found = decompose_anchored(weight, moments_of((x, z)), anchor)
    expected = decompose_anchored(weight, moments_of((mixed, z)))
    assert found.floor == pytest.approx(expected.floor, abs=LOSS * expected.energy)
    assert found.energy == pytest.approx(expected.energy, rel=LOSS)
    size = float(expected.target.norm())
    torch.testing.assert_close(found.target, expected.target, rtol=0, atol=WEIGHTS * size)
    for rank in range(min(out, inner) + 1):
        slack = LOSS * expected.energy
        assert found.loss(rank) == pytest.approx(expected.loss(rank), abs=slack)
        dense = found.truncate(rank).dense()
        assert measured_loss(weight, dense, (mixed, z)) == pytest.approx(
            found.loss(rank), abs=slack
        )


def four_solutions(weight: torch.Tensor, moments: Moments, rank: int) -> list[Factors]:
    solved = [
        decompose_outputs(weight),
        decompose_outputs(weight, moments.original),
        decompose_outputs(weight, moments.shifted),
        decompose_anchored(weight, moments),
    ]
    return [each.truncate(rank) for each in solved]


def four_metrics(weight: torch.Tensor, dense: torch.Tensor, streams: Streams) -> list[float]:
    x, z = streams
    return [
        float((weight - dense).square().sum()),
        measured_loss(weight, dense, (x, x)),
        measured_loss(weight, dense, (z, z)),
        measured_loss(weight, dense, (x, z)),
    ]


def test_each_of_the_four_objectives_wins_on_its_own_metric():
    """The paper's table 1 with sizes of a page: strictly, and nowhere else."""
    weight, streams = normal(1, 24, 32), streams_of(2, 400, 32)
    solutions = four_solutions(weight, moments_of(streams), 8)
    table = [four_metrics(weight, each.dense(), streams) for each in solutions]
    for metric in range(4):
        column = [row[metric] for row in table]
        others = column[:metric] + column[metric + 1 :]
        assert column[metric] < 0.999 * min(others), column


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 25), seed=SEEDS)
@relaxed
def test_no_objective_beats_another_on_its_own_metric(out, inner, tokens, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = moments_of(streams)
    anchored = decompose_anchored(weight, moments)
    for rank in range(1, min(out, inner) + 1):
        solutions = four_solutions(weight, moments, rank)
        table = [four_metrics(weight, each.dense(), streams) for each in solutions]
        for metric in range(4):
            nothing = four_metrics(weight, torch.zeros_like(weight), streams)[metric]
            scale = rounding_scale(anchored, moments) if metric == 3 else nothing
            assert table[metric][metric] <= min(row[metric] for row in table) + LOSS * scale


# where the shifted moment is singular


@given(out=SIDES, inner=SIDES, data=st.data(), seed=SEEDS)
@relaxed
def test_fewer_tokens_than_features_leave_no_floor(out, inner, data, seed):
    """That many inputs can be mapped anywhere; beyond them the map is the weight's."""
    tokens = data.draw(st.integers(1, inner - 1), label="tokens")
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = moments_of(streams)
    solved = decompose_anchored(weight, moments)
    slack = LINALG * rounding_scale(solved, moments)
    assert solved.floor <= slack
    dense = solved.truncate(min(tokens, out)).dense()
    assert measured_loss(weight, dense, streams) <= slack


def test_dead_channels_keep_the_weight_and_change_nothing_else():
    """The paper's pseudo-inverse would make the columns zero, for inputs nobody has seen."""
    weight, (x, z) = normal(1, 5, 6), streams_of(2, 40, 6)
    z[:, [1, 4]] = 0
    solved = decompose_anchored(weight, moments_of((x, z)))
    assert torch.equal(solved.target[:, [1, 4]], weight[:, [1, 4]])
    live = [0, 2, 3, 5]
    expected = torch.linalg.lstsq(z[:, live], x @ weight.mT).solution.mT
    torch.testing.assert_close(solved.target[:, live], expected, rtol=0, atol=WEIGHTS)
    assert solved.floor == pytest.approx(
        measured_loss(weight, solved.target, (x, z)), rel=LOSS * solved.energy / solved.floor
    )


def test_copies_of_a_feature_are_no_trouble():
    """Singular with any number of tokens, which nobody tells it."""
    weight, (x, z) = normal(1, 5, 6), streams_of(2, 400, 6)
    z[:, 3] = 2 * z[:, 0]
    z[:, 5] = z[:, 1] - z[:, 2]
    moments = moments_of((x, z))
    solved = decompose_anchored(weight, moments)
    best = optimal_losses(weight, (x, z))
    assert float(solved.target.norm()) < 10 * float(weight.norm())
    for rank in range(6):
        dense = solved.truncate(rank).dense()
        slack = LOSS * solved.energy
        assert solved.loss(rank) == pytest.approx(best[rank], abs=slack)
        assert measured_loss(weight, dense, (x, z)) == pytest.approx(best[rank], abs=slack)


def test_nothing_arrives():
    """All of the wanted outputs is floor, and the weight is as good as any map."""
    weight, (x, _) = normal(1, 3, 4), streams_of(2, 20, 4)
    solved = decompose_anchored(weight, moments_of((x, torch.zeros_like(x))))
    wanted = float((x @ weight.mT).square().sum(dim=1).mean())
    assert [solved.loss(rank) for rank in range(4)] == pytest.approx([wanted] * 4, rel=LOSS)
    assert torch.equal(solved.target, weight)


# the ridge, and the energy in the place of a moment


@given(
    out=SIDES,
    inner=SIDES,
    tokens=st.integers(1, 25),
    seed=SEEDS,
    relative=st.floats(1e-3, 10),
    anchor=st.sampled_from([0.0, 0.5, 1.0]),
)
@relaxed
def test_a_ridge_is_more_tokens_in_both_streams(out, inner, tokens, seed, relative, anchor):
    """Rows √λ I under both, the mean still over the tokens: the loss gains λ ‖W − W'‖²."""
    weight, (x, z) = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = moments_of((x, z)).ridged(relative)
    size = relative * float((z.mT @ z / tokens).diagonal().mean())
    rows = (size * tokens) ** 0.5 * torch.eye(inner, dtype=torch.float64)
    longer = torch.cat([x, rows]), torch.cat([z, rows])
    share = len(longer[0]) / tokens  # the helpers take a mean over all rows
    solved = decompose_anchored(weight, moments, anchor)
    best = [share * loss for loss in optimal_losses(weight, longer, anchor)]
    slack = LOSS * solved.energy
    for rank in range(min(out, inner) + 1):
        factors = solved.truncate(rank)
        dense = factors.dense()
        assert solved.loss(rank) == pytest.approx(best[rank], abs=slack)
        assert share * measured_loss(weight, dense, longer, anchor) == pytest.approx(
            best[rank], abs=slack
        )
        shrunk = size * float((weight - dense).square().sum())
        both = measured_loss(weight, dense, (x, z), anchor) + shrunk
        assert anchored_loss(weight, factors, moments, anchor) == pytest.approx(both, abs=slack)


def test_a_large_ridge_gives_the_weight_and_a_small_one_least_squares():
    weight, streams = normal(1, 5, 6), streams_of(2, 40, 6)
    moments, free = moments_of(streams), best_map(weight, streams)
    distances = []
    for relative in (1e-12, 1e-4, 1e-2, 1.0, 1e2, 1e12):
        target = decompose_anchored(weight, moments.ridged(relative)).target
        distances.append(float((target - weight).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(float((free - weight).norm()), rel=1e-6)
    assert distances[-1] < 1e-9


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 25), seed=SEEDS)
@relaxed
def test_the_energy_of_the_outputs_does_in_the_place_of_the_original(out, inner, tokens, seed):
    weight, streams = normal(seed, out, inner), streams_of(seed + 1, tokens, inner)
    moments = moments_of(streams)
    energy = float((streams[0] @ weight.mT).square().sum(dim=1).mean())
    lean = replace(moments, original=None, output_energy=energy)
    factors = Factors(normal(seed + 4, out, 2), normal(seed + 5, 2, inner))
    for relative in (0.0, 0.01, 1.0):
        for anchor in (0.4, 1.0):
            full, less = moments.ridged(relative), lean.ridged(relative)
            expected = decompose_anchored(weight, full, anchor)
            found = decompose_anchored(weight, less, anchor)
            assert torch.equal(found.basis, expected.basis)
            assert torch.equal(found.singular_values, expected.singular_values)
            slack = LINALG * rounding_scale(expected, full)
            assert found.floor == pytest.approx(expected.floor, abs=slack)
            assert anchored_loss(weight, factors, less, anchor) == pytest.approx(
                anchored_loss(weight, factors, full, anchor), rel=1e-9
            )


def test_without_either_there_is_no_floor_to_tell():
    weight, streams = normal(1, 3, 4), streams_of(2, 20, 4)
    moments = replace(moments_of(streams), original=None)
    factors = decompose_outputs(weight).truncate(1)
    for ask in (
        lambda: decompose_anchored(weight, moments),
        lambda: anchored_loss(weight, factors, moments),
    ):
        with pytest.raises(ValueError, match="needs the energy of the original outputs"):
            ask()
    assert decompose_anchored(weight, moments, 0.0).floor == 0.0  # the shift-aware one needs none


# refusals and rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("field", "named"),
    [
        ("original", "the second moment of the original inputs"),
        ("shifted", "the second moment"),
        ("drift", "the drift"),
    ],
)
def test_what_is_not_finite_is_refused_by_name(value, field, named):
    weight, moments = normal(1, 3, 4), moments_of(streams_of(2, 20, 4))
    getattr(moments, field)[1, 1] = value
    with pytest.raises(NumericalError, match=rf"^{named} holds 1 entries"):
        decompose_anchored(weight, moments)
    weight[0, 0] = value
    with pytest.raises(NumericalError, match=r"^the weight holds 1 entries"):
        decompose_anchored(weight, moments_of(streams_of(2, 20, 4)))


def test_a_loss_is_never_negative():
    weight, (x, _) = normal(1, 4, 4), streams_of(2, 40, 4)
    turn = normal(3, 4, 4)
    streams = x, x @ turn  # an exact map exists, so all that is left is rounding
    moments = moments_of(streams)
    solved = decompose_anchored(weight, moments)
    assert 0 <= solved.floor <= LOSS * solved.energy
    loss = anchored_loss(weight, solved.truncate(4), moments)
    assert 0 <= loss <= LOSS * solved.energy


def ill_conditioned(seed: int, decay: float) -> tuple[torch.Tensor, Streams]:
    """Weight and float32 streams whose singular values fall to `decay` of the first."""
    features, tokens = 64, 512
    turn = torch.linalg.qr(normal(seed, features, features)).Q
    spread = decay ** torch.linspace(0, 1, features, dtype=torch.float64)
    x = normal(seed + 1, tokens, features) * spread @ turn
    z = 0.9 * x + 0.1 * (normal(seed + 2, tokens, features) * spread @ turn)
    return normal(seed + 3, 48, features), (x.float(), z.float())


@pytest.mark.parametrize("decay", [1e-2, 1e-4])
def test_float64_in_the_solve_holds_where_float32_breaks(decay):
    """A moment of condition 1e8 has no float32 root, or one that costs; see the paper's code."""
    weight, (x, z) = ill_conditioned(1, decay)
    exact = x.double(), z.double()
    best = optimal_losses(weight, exact)
    solved = decompose_anchored(weight, moments_of(exact))
    single = (z.mT @ z / len(z)).float()
    root, failed = torch.linalg.cholesky_ex(single)
    for rank in (4, 16, 32, 47):
        dense = solved.truncate(rank).dense()
        assert measured_loss(weight, dense, exact) / best[rank] - 1 <= EXCESS
        if decay == 1e-4 and int(failed) == 0:
            cross = weight.float() @ (x.mT @ z / len(x))
            inverse = torch.linalg.inv(root)
            left, values, right = torch.linalg.svd(cross @ inverse.mT, full_matrices=False)
            lossy = (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse
            assert measured_loss(weight, lossy.double(), exact) / best[rank] - 1 > 100 * EXCESS


@pytest.mark.parametrize("size", [16, 64, 200])
def test_streamed_moments_in_float32_give_the_solution_of_all_tokens(size):
    """Any batching; tokens as a model gives them, with heavy ones in both streams."""
    weight = normal(1, 12, 16)
    x, z = (stream.float() for stream in streams_of(2, 600, 16))
    for token, times in ((3, 300.0), (170, 1000.0)):
        x[token] *= times
        z[token] *= times
    original, shifted, drift = MomentAccumulator(16), MomentAccumulator(16), DriftAccumulator(16)
    for a, b in zip(x.split(size), z.split(size), strict=True):
        original.update(a)
        shifted.update(b)
        drift.update(a, b)
    moments = Moments(original.result().original, 600, shifted.result().original, drift.result())
    exact = x.double(), z.double()
    solved = decompose_anchored(weight, moments)
    best = optimal_losses(weight, exact)
    for rank in (1, 4, 8, 12):
        measured = measured_loss(weight, solved.truncate(rank).dense(), exact)
        assert measured / best[rank] - 1 <= EXCESS
        assert solved.loss(rank) == pytest.approx(measured, abs=1e-9 * solved.energy)


def test_what_float32_shows_beyond_the_tokens_is_not_regressed_on():
    """70 tokens of 90 features: the other 20 directions of the moment are rounding."""
    weight = normal(1, 5, 90)
    x, z = (stream.float() for stream in streams_of(2, 70, 90))
    original, shifted, drift = MomentAccumulator(90), MomentAccumulator(90), DriftAccumulator(90)
    original.update(x)
    shifted.update(z)
    drift.update(x, z)
    streamed = Moments(original.result().original, 70, shifted.result().original, drift.result())
    exact = decompose_anchored(weight, moments_of((x.double(), z.double())))
    found = decompose_anchored(weight, streamed)
    gap = float((found.target - exact.target).norm())
    assert gap < 1e-2 * float(exact.target.norm())
    untold = decompose_anchored(weight, replace(streamed, tokens=1000))
    assert float((untold.target - exact.target).norm()) > 10 * gap
