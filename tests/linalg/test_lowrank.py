import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from slimrank.errors import NumericalError, NumericalWarning
from slimrank.linalg import (
    Decomposition,
    Factors,
    MomentAccumulator,
    decompose_outputs,
    decompose_whitened,
    output_loss,
)
from tolerances import TOLERANCE

LOSS = TOLERANCE["loss", torch.float64]
WEIGHTS = TOLERANCE["weights", torch.float64]
LINALG = TOLERANCE["linalg", torch.float64]
EXCESS = TOLERANCE["excess", torch.float64]

ROUTES = [decompose_outputs, decompose_whitened]
SHAPES = [(5, 5), (9, 4), (4, 9), (1, 6), (6, 1), (1, 1)]
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 9)

relaxed = settings(deadline=None, max_examples=25)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def activations(seed: int, tokens: int, features: int) -> torch.Tensor:
    """Correlated tokens whose features differ in size by up to 100."""
    draw = generator(seed)
    raw = torch.randn(tokens, features, generator=draw, dtype=torch.float64)
    sizes = 10 ** (2 * torch.rand(features, generator=draw, dtype=torch.float64) - 1)
    mixing = torch.randn(features, features, generator=draw, dtype=torch.float64) / features
    return raw * sizes + raw @ mixing


def second_moment(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mT @ tokens / len(tokens)


def measured_loss(weight: torch.Tensor, dense: torch.Tensor, tokens: torch.Tensor) -> float:
    """What the loss is by definition: token by token, no second moment anywhere."""
    gaps = tokens @ weight.mT - tokens @ dense.mT
    return float(gaps.square().sum(dim=1).mean())


def optimal_losses(weight: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Eckart and Young on the stacked outputs: no map of that rank can do better."""
    values = torch.linalg.svdvals(tokens @ weight.mT) / len(tokens) ** 0.5
    return [float(values[rank:].square().sum()) for rank in range(min(weight.shape) + 1)]


def well_conditioned(seed: int, features: int) -> torch.Tensor:
    mixing = normal(seed, features, features)
    return mixing @ mixing.mT / features + torch.eye(features, dtype=torch.float64)


def has_gap(solved: Decomposition, rank: int) -> bool:
    """Whether the best map of that rank is unique by a margin."""
    values = solved.singular_values
    following = float(values[rank]) if rank < len(values) else 0.0
    return float(values[rank - 1]) - following > 1e-3 * float(values[0])


# by hand


@pytest.mark.parametrize("decompose", ROUTES)
def test_diagonal_case_by_hand(decompose):
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    solved = decompose(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0])))
    assert solved.singular_values.tolist() == pytest.approx([10.0, 3.0, 2.0], rel=1e-14)
    assert [solved.loss(r) for r in range(4)] == pytest.approx([113.0, 13.0, 4.0, 0.0], abs=1e-12)
    assert solved.energy == pytest.approx(113.0)
    assert solved.jitter == 0.0
    expected = torch.eye(3, dtype=torch.float64)[:, [0, 2, 1]]
    torch.testing.assert_close(solved.basis, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        solved.truncate(1).dense(), torch.diag(torch.tensor([1.0, 0, 0]).double())
    )
    torch.testing.assert_close(
        solved.truncate(2).dense(), torch.diag(torch.tensor([1.0, 0, 3.0]).double())
    )


@pytest.mark.parametrize("decompose", ROUTES)
def test_single_column_by_hand(decompose):
    solved = decompose(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0]]))
    assert solved.energy == pytest.approx(20.0)
    assert solved.loss(1) == 0.0
    root = 5**-0.5
    assert solved.basis.flatten().tolist() == pytest.approx([root, 2 * root])


@pytest.mark.parametrize("decompose", ROUTES)
def test_single_row_by_hand(decompose):
    solved = decompose(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert solved.energy == pytest.approx(6.0)
    assert solved.loss(1) == 0.0
    assert solved.truncate(1).dense().tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("white", ["outputs", "whitened", "none"])
def test_white_inputs_give_the_truncated_svd(shape, white):
    weight = normal(1, *shape)
    eye = torch.eye(shape[1], dtype=torch.float64)
    if white == "outputs":
        solved = decompose_outputs(weight, eye)
    elif white == "whitened":
        solved = decompose_whitened(weight, eye)
    else:
        solved = decompose_outputs(weight)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(solved.singular_values, values, rtol=1e-10, atol=1e-12)
    for rank in range(min(shape) + 1):
        expected = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(solved.truncate(rank).dense(), expected, rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decompose", ROUTES)
def test_full_rank_gives_the_weight_back(shape, decompose):
    weight = normal(2, *shape)
    solved = decompose(weight, second_moment(activations(3, 40, shape[1])))
    rank = min(shape)
    factors = solved.truncate(rank)
    assert factors.left.shape == (shape[0], rank)
    assert factors.right.shape == (rank, shape[1])
    torch.testing.assert_close(factors.dense(), weight, rtol=0, atol=LINALG)
    assert solved.loss(rank) == 0.0


# by property


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_reported_loss_is_the_loss_on_the_tokens_and_the_least(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    solved = decompose_outputs(weight, second_moment(inputs))
    best = optimal_losses(weight, inputs)
    for rank in range(min(out, inner) + 1):
        measured = measured_loss(weight, solved.truncate(rank).dense(), inputs)
        assert solved.loss(rank) == pytest.approx(measured, abs=LOSS * best[0])
        assert measured == pytest.approx(best[rank], abs=LOSS * best[0])


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_whitened_reports_the_loss_on_the_tokens_and_the_least(out, inner, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, 3 * inner + 5, inner)
    solved = decompose_whitened(weight, second_moment(inputs))
    best = optimal_losses(weight, inputs)
    for rank in range(min(out, inner) + 1):
        measured = measured_loss(weight, solved.truncate(rank).dense(), inputs)
        assert solved.loss(rank) == pytest.approx(measured, abs=LOSS * best[0])
        assert measured == pytest.approx(best[rank], abs=LOSS * best[0])


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_no_perturbation_and_no_competitor_does_better(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    solved = decompose_outputs(weight, second_moment(inputs))
    draw = generator(seed + 2)

    def noise(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    slack = LOSS * solved.energy
    for rank in range(1, min(out, inner) + 1):
        factors = solved.truncate(rank)
        least = solved.loss(rank)
        for size in (1e-3, 0.1, 1.0):
            moved = (factors.left + size * noise(out, rank)) @ (
                factors.right + size * noise(rank, inner)
            )
            assert measured_loss(weight, moved, inputs) >= least - slack
        scratch = noise(out, rank) @ noise(rank, inner)
        assert measured_loss(weight, scratch, inputs) >= least - slack
        # a competitor that is the best for its random column space
        columns = torch.linalg.qr(noise(out, rank)).Q
        projected = columns @ (columns.mT @ weight)
        assert measured_loss(weight, projected, inputs) >= least - slack


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_loss_never_grows_and_ranks_nest(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    moment = second_moment(activations(seed + 1, tokens, inner))
    solved = decompose_outputs(weight, moment)
    side = min(out, inner)
    losses = [solved.loss(rank) for rank in range(side + 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    whole = solved.truncate(side)
    for rank in range(side + 1):
        factors = solved.truncate(rank)
        assert torch.equal(factors.left, whole.left[:, :rank])
        torch.testing.assert_close(factors.right, whole.right[:rank], rtol=0, atol=LINALG * 100)


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_basis_is_orthonormal_and_values_descend(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    solved = decompose_outputs(weight, second_moment(activations(seed + 1, tokens, inner)))
    side = min(out, inner)
    assert solved.basis.shape == (out, side)
    assert solved.singular_values.shape == (side,)
    eye = torch.eye(side, dtype=torch.float64)
    torch.testing.assert_close(solved.basis.mT @ solved.basis, eye, rtol=0, atol=LINALG)
    assert bool((solved.singular_values.diff() <= 0).all())
    assert float(solved.singular_values.min()) >= 0.0


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_the_two_routes_agree_where_the_moment_is_well_conditioned(out, inner, seed):
    weight = normal(seed, out, inner)
    moment = well_conditioned(seed + 1, inner)
    swift = decompose_outputs(weight, moment)
    whitened = decompose_whitened(weight, moment)
    assert whitened.jitter == 0.0
    for rank in range(1, min(out, inner) + 1):
        assert swift.loss(rank) == pytest.approx(whitened.loss(rank), abs=LOSS * swift.energy)
        if has_gap(swift, rank):
            torch.testing.assert_close(
                swift.truncate(rank).dense(),
                whitened.truncate(rank).dense(),
                rtol=0,
                atol=WEIGHTS * float(weight.norm()),
            )


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_energy_is_the_mean_squared_norm_of_the_outputs(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    energy = float((inputs @ weight.mT).square().sum(dim=1).mean())
    solved = decompose_outputs(weight, second_moment(inputs))
    assert solved.energy == pytest.approx(energy, rel=LOSS)
    assert solved.loss(0) == pytest.approx(energy, rel=LOSS)


@given(out=SIDES, inner=SIDES, tokens=st.integers(4, 20), seed=SEEDS)
@relaxed
def test_rotated_inputs_rotate_right_and_leave_the_loss(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    turn = torch.linalg.qr(normal(seed + 2, inner, inner)).Q
    plain = decompose_outputs(weight, second_moment(inputs))
    turned = decompose_outputs(weight @ turn.mT, second_moment(inputs @ turn.mT))
    scale = float(weight.norm())
    for rank in range(1, min(out, inner) + 1):
        assert turned.loss(rank) == pytest.approx(plain.loss(rank), abs=LOSS * plain.energy)
        if has_gap(plain, rank):
            torch.testing.assert_close(
                turned.truncate(rank).dense(),
                plain.truncate(rank).dense() @ turn.mT,
                rtol=0,
                atol=WEIGHTS * scale,
            )
        if all(has_gap(plain, r) for r in range(1, rank + 1)):
            # the columns themselves are unique, up to the sign, which the largest entry fixes
            first, second = plain.truncate(rank), turned.truncate(rank)
            signs = (first.left * second.left).sum(dim=0).sign()
            torch.testing.assert_close(
                second.right * signs[:, None],
                first.right @ turn.mT,
                rtol=0,
                atol=WEIGHTS * scale,
            )


@given(
    out=SIDES,
    inner=SIDES,
    tokens=st.integers(1, 20),
    seed=SEEDS,
    scale=st.floats(1e-3, 1e3),
    of=st.sampled_from(["weight", "inputs"]),
)
@relaxed
def test_scaling_scales_the_loss_by_the_square(out, inner, tokens, seed, scale, of):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    plain = decompose_outputs(weight, second_moment(inputs))
    if of == "weight":
        scaled = decompose_outputs(scale * weight, second_moment(inputs))
    else:
        scaled = decompose_outputs(weight, second_moment(scale * inputs))
    for rank in range(min(out, inner) + 1):
        assert scaled.loss(rank) == pytest.approx(
            scale**2 * plain.loss(rank), abs=LOSS * scaled.energy
        )


# too few tokens


@given(out=SIDES, inner=st.integers(2, 9), data=st.data(), seed=SEEDS)
@relaxed
def test_fewer_tokens_than_features_are_exact_at_that_rank(out, inner, data, seed):
    tokens = data.draw(st.integers(1, inner - 1), label="tokens")
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = decompose_outputs(weight, second_moment(inputs))
    assert solved.jitter == 0.0
    assert bool(torch.isfinite(solved.basis).all())
    assert bool(torch.isfinite(solved.singular_values).all())
    rank = min(tokens, out)
    factors = solved.truncate(rank)
    assert bool(torch.isfinite(factors.right).all())
    assert measured_loss(weight, factors.dense(), inputs) <= LOSS * solved.energy
    assert solved.loss(rank) <= LOSS * solved.energy
    torch.testing.assert_close(
        solved.truncate(min(out, inner)).dense(), weight, rtol=0, atol=LINALG * 100
    )


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_a_zero_moment_leaves_all_to_the_weight(out, inner, seed):
    weight = normal(seed, out, inner)
    solved = decompose_outputs(weight, torch.zeros(inner, inner, dtype=torch.float64))
    plain = decompose_outputs(weight)
    assert solved.energy == 0.0
    size = float(weight.norm())
    for rank in range(1, min(out, inner) + 1):
        settled = float((weight - solved.truncate(rank).dense()).square().sum())
        assert settled == pytest.approx(plain.loss(rank), abs=LOSS * size**2)
        if has_gap(plain, rank):
            torch.testing.assert_close(
                solved.truncate(rank).dense(),
                plain.truncate(rank).dense(),
                rtol=0,
                atol=WEIGHTS * size,
            )


@given(out=st.integers(2, 9), inner=st.integers(2, 9), tokens=st.integers(1, 8), seed=SEEDS)
@example(out=9, inner=3, tokens=1, seed=9)
@relaxed
def test_open_directions_are_settled_by_the_weight(out, inner, tokens, seed):
    side = min(out, inner)
    assume(tokens < side)
    weight = normal(seed, out, inner)
    inputs = normal(seed + 1, tokens, inner)
    outputs = inputs @ weight.mT
    spread = torch.linalg.svdvals(outputs)
    assume(float(spread[-1]) > 1e-3 * float(spread[0]))
    solved = decompose_outputs(weight, second_moment(inputs))
    seen = torch.linalg.qr(outputs.mT).Q
    # what an exact map of that rank must lose at least: the tail of the unseen part of the weight
    unseen = torch.linalg.svdvals(weight - seen @ (seen.mT @ weight))
    size = float(weight.square().sum())
    for rank in range(tokens, side + 1):
        dense = solved.truncate(rank).dense()
        error = float((weight - dense).square().sum())
        assert measured_loss(weight, dense, inputs) <= LOSS * solved.energy
        assert error == pytest.approx(
            float(unseen[rank - tokens :].square().sum()), abs=1e-9 * size
        )
        extra = normal(seed + 2 + rank, out, rank - tokens)
        completed = torch.linalg.qr(torch.cat([seen, extra], dim=1)).Q
        other = weight - completed @ (completed.mT @ weight)
        assert error <= float(other.square().sum()) + 1e-9 * size


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_the_basis_is_orthonormal_down_to_the_faintest_direction(shape):
    """Energies over twelve orders of magnitude: the faint ones lie just above the roundoff."""
    inner = shape[1]
    energies = torch.logspace(0, -12, inner, dtype=torch.float64)
    turn = torch.linalg.qr(normal(1, inner, inner)).Q
    moment = turn * energies @ turn.mT
    solved = decompose_outputs(normal(2, *shape), (moment + moment.mT) / 2)
    side = min(shape)
    eye = torch.eye(side, dtype=torch.float64)
    torch.testing.assert_close(solved.basis.mT @ solved.basis, eye, rtol=0, atol=LINALG)


def test_dead_outputs_and_a_zero_weight_are_no_trouble():
    moment = second_moment(activations(1, 30, 4))
    weight = normal(2, 6, 4)
    weight[1:4] = 0
    solved = decompose_outputs(weight, moment)
    torch.testing.assert_close(solved.truncate(3).dense(), weight, rtol=0, atol=LINALG * 10)
    for zero in (torch.zeros(6, 4), torch.zeros(4, 4), torch.zeros(2, 4)):
        nothing = decompose_outputs(zero.double(), moment)
        assert nothing.energy == 0.0
        for rank in range(min(zero.shape) + 1):
            assert float(nothing.truncate(rank).dense().abs().max()) == 0.0


def test_whitening_a_singular_moment_warns_and_solves_the_one_with_the_jitter():
    weight = normal(1, 5, 6)
    inputs = normal(2, 3, 6)
    moment = second_moment(inputs)
    with pytest.warns(NumericalWarning, match="singular"):
        solved = decompose_whitened(weight, moment)
    assert solved.jitter > 0.0
    held = moment + solved.jitter * torch.eye(6, dtype=torch.float64)
    for rank in range(6):
        loss = output_loss(weight, solved.truncate(rank), held)
        assert loss == pytest.approx(solved.loss(rank), abs=1e-9 * solved.energy)


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("decompose", ROUTES)
@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_what_is_not_finite_is_refused_by_name(value, decompose, shape):
    weight = normal(1, *shape)
    moment = second_moment(activations(2, 20, shape[1]))
    bad_weight, bad_moment = weight.clone(), moment.clone()
    bad_weight[0, 1] = value
    bad_moment[1, 1] = value
    with pytest.raises(NumericalError, match="the weight holds 1 "):
        decompose(bad_weight, moment)
    with pytest.raises(NumericalError, match="the second moment holds 1 "):
        decompose(weight, bad_moment)


def test_a_bad_weight_is_refused_without_a_moment_too():
    with pytest.raises(NumericalError, match="the weight"):
        decompose_outputs(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("rank", [-1, 4, 100])
def test_a_rank_out_of_range_is_refused(rank):
    solved = decompose_outputs(normal(1, 3, 5), torch.eye(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"rank {rank} is not within 0 and 3"):
        solved.truncate(rank)
    with pytest.raises(ValueError, match=f"rank {rank} is not within 0 and 3"):
        solved.loss(rank)


def test_rank_zero_is_the_zero_map():
    solved = decompose_outputs(normal(1, 3, 5), torch.eye(5, dtype=torch.float64))
    factors = solved.truncate(0)
    assert factors.left.shape == (3, 0)
    assert factors.right.shape == (0, 5)
    assert torch.equal(factors.dense(), torch.zeros(3, 5, dtype=torch.float64))


# output_loss


@given(out=SIDES, inner=SIDES, rank=st.integers(1, 4), tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_output_loss_is_the_mean_over_tokens(out, inner, rank, tokens, seed):
    weight = normal(seed, out, inner)
    inputs = activations(seed + 1, tokens, inner)
    factors = Factors(normal(seed + 2, out, rank), normal(seed + 3, rank, inner))
    expected = measured_loss(weight, factors.left @ factors.right, inputs)
    assert output_loss(weight, factors, second_moment(inputs)) == pytest.approx(expected, rel=1e-9)
    plain = float((weight - factors.left @ factors.right).square().sum())
    assert output_loss(weight, factors) == pytest.approx(plain, rel=1e-12)


def test_output_loss_sees_the_rounding_of_the_factors():
    weight = normal(1, 6, 6)
    exact = decompose_outputs(weight).truncate(6)
    rounded = Factors(exact.left.bfloat16(), exact.right.bfloat16())
    expected = float((weight - rounded.left.double() @ rounded.right.double()).square().sum())
    assert output_loss(weight, exact) < 1e-25
    assert output_loss(weight, rounded) == pytest.approx(expected, rel=1e-12)
    assert output_loss(weight, rounded) > 1e-6


def test_output_loss_is_never_negative():
    weight = normal(1, 4, 4)
    factors = decompose_outputs(weight).truncate(4)
    negative = -torch.eye(4, dtype=torch.float64)
    assert output_loss(weight, factors, negative) == 0.0


# massive activations


def heavy_case(tokens: int, out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32, as a model gives them; three tokens 300, 1000 and 3000 times the others."""
    draw = generator(20)
    inputs = torch.randn(tokens, inner, generator=draw)
    weight = torch.randn(out, inner, generator=draw)
    for token, times in ((3, 300.0), (17, 1000.0), (41, 3000.0)):
        inputs[token] *= times
    return weight, inputs


def excess(weight: torch.Tensor, factors: Factors, inputs: torch.Tensor, best: float) -> float:
    exact = inputs.double()
    outputs = exact @ weight.double().mT
    mapped = exact @ factors.right.double().mT @ factors.left.double().mT
    return float((outputs - mapped).square().sum()) / len(exact) / best - 1


@pytest.mark.parametrize(
    ("tokens", "out", "inner"),
    [(2048, 64, 64), (2048, 96, 64), (2048, 48, 64), (48, 64, 64), (48, 96, 64), (48, 48, 64)],
)
def test_heavy_tokens_cost_nothing(tokens, out, inner):
    weight, inputs = heavy_case(tokens, out, inner)
    accumulator = MomentAccumulator(inner)
    accumulator.update(inputs)
    solved = decompose_outputs(weight, accumulator.result().original)
    best = optimal_losses(weight.double(), inputs.double())
    for rank in (1, 2, 3, 4, 8, 16, 32, 40):
        assert excess(weight, solved.truncate(rank), inputs, best[rank]) <= EXCESS


@pytest.mark.parametrize("tokens", [2048, 48])
def test_float32_throughout_would_not_do(tokens):
    """The case is hard: what the test above holds to 1e-8 a float32 solve misses or cannot make."""
    weight, inputs = heavy_case(tokens, 64, 64)
    best = optimal_losses(weight.double(), inputs.double())
    root, failed = torch.linalg.cholesky_ex(inputs.mT @ inputs / tokens)
    if int(failed) == 0:
        basis = torch.linalg.svd(weight @ root, full_matrices=False).U
        for rank in (4, 8, 16, 32):
            left = basis[:, :rank].double()
            factors = Factors(left, left.mT @ weight.double())
            assert excess(weight, factors, inputs, best[rank]) > 100 * EXCESS
    else:
        assert tokens < 64


@relaxed
@given(seed=SEEDS, out=SIDES, inside=SIDES, tokens=st.integers(1, 12), rounded=st.booleans())
def test_measured_losses_are_those_of_the_factors_of_each_rank(seed, out, inside, tokens, rounded):
    weight, moment = normal(seed, out, inside), second_moment(activations(seed, tokens, inside))
    solved = decompose_outputs(weight, moment, tokens)
    if rounded:
        solved = solved.shortened(min(out, inside), torch.bfloat16)  # so that it shows
    found = solved.measured_losses(moment)
    ranks = range(min(out, inside) + 1)
    expected = [output_loss(weight, solved.truncate(rank), moment) for rank in ranks]
    energy = output_loss(weight, solved.truncate(0), moment)
    assert found.shape == (len(ranks),)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= LOSS * energy


def test_measured_losses_under_no_moment_are_of_the_weight():
    weight = normal(3, 5, 7)
    solved = decompose_outputs(weight)
    tails = torch.tensor([solved.loss(rank) for rank in range(6)], dtype=torch.float64)
    torch.testing.assert_close(solved.measured_losses(None), tails, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [0, 1, 3, 4])
def test_shortened_keeps_the_first_columns(columns, dtype):
    weight, moment = normal(1, 4, 9), second_moment(activations(1, 40, 9))
    solved = decompose_outputs(weight, moment)
    short = solved.shortened(columns, dtype)
    assert short.basis.dtype == dtype
    assert torch.equal(short.basis, solved.basis[:, :columns].to(dtype))
    assert short.basis.untyped_storage().nbytes() == short.basis.nbytes  # the rest is let go
    assert torch.equal(short.singular_values, solved.singular_values)
    assert short.loss(columns) == solved.loss(columns)
    gap = output_loss(weight, short.truncate(columns), moment) - solved.loss(columns)
    assert abs(gap) <= 1e-12 * solved.energy
    for ask in (short.truncate, short.loss):
        with pytest.raises(ValueError, match=rf"rank {columns + 1} is not within 0 and {columns}"):
            ask(columns + 1)


# the floor, and the balanced split


@pytest.mark.parametrize("floor", [0.0, 2.5])
def test_a_floor_is_part_of_every_loss(floor):
    moment = second_moment(activations(1, 40, 5))
    plain = decompose_outputs(normal(1, 6, 5), moment)
    raised = replace(plain, floor=floor)
    for rank in range(6):
        assert raised.loss(rank) == pytest.approx(floor + plain.loss(rank), rel=1e-14)
    assert raised.energy == pytest.approx(floor + plain.energy, rel=1e-14)
    assert raised.loss(0) == pytest.approx(raised.energy, rel=1e-12)
    assert raised.loss(5) == floor
    assert raised.shortened(2, torch.float32).loss(2) == raised.loss(2)
    assert torch.equal(raised.measured_losses(moment), plain.measured_losses(moment))


@given(out=SIDES, inner=SIDES, tokens=st.integers(1, 20), seed=SEEDS)
@relaxed
def test_both_splits_have_the_same_product(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    solved = decompose_outputs(weight, second_moment(activations(seed + 1, tokens, inner)), tokens)
    for rank in range(min(out, inner) + 1):
        plain, balanced = solved.truncate(rank), solved.truncate(rank, split="balanced")
        assert balanced.left.shape == (out, rank)
        assert balanced.right.shape == (rank, inner)
        for tensor in (balanced.left, balanced.right):
            assert bool(torch.isfinite(tensor).all())
        bound = 10 * LINALG * float(weight.norm())
        torch.testing.assert_close(balanced.dense(), plain.dense(), rtol=0, atol=bound)


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_a_balanced_split_gives_each_factor_the_root_of_the_singular_values(out, inner, seed):
    """Columns of the left factor by their norm, rows of the right one by what they carry."""
    weight, moment = normal(seed, out, inner), well_conditioned(seed + 1, inner)
    solved = decompose_outputs(weight, moment)
    assume(has_gap(solved, min(out, inner)))
    factors = solved.truncate(min(out, inner), split="balanced")
    root = solved.singular_values.sqrt()
    torch.testing.assert_close(factors.left.norm(dim=0), root, rtol=1e-10, atol=0)
    carried = ((factors.right @ moment) * factors.right).sum(dim=1).sqrt()
    torch.testing.assert_close(carried, root, rtol=1e-6, atol=0)
    gram = factors.left.mT @ factors.left
    bound = 100 * LINALG * float(root.max()) ** 2
    torch.testing.assert_close(gram, torch.diag(root.square()), rtol=0, atol=bound)


def test_a_balanced_split_by_hand():
    weight = torch.diag(torch.tensor([9.0, 4.0]).double())
    factors = decompose_outputs(weight).truncate(2, split="balanced")
    assert factors.left.tolist() == [[3.0, 0.0], [0.0, 2.0]]
    assert factors.right.tolist() == [[3.0, 0.0], [0.0, 2.0]]


def test_singular_values_of_zero_leave_a_balanced_split_finite():
    """One token of two known directions, a dead row, and no weight at all."""
    weight = normal(1, 4, 5)
    weight[3] = 0
    few = decompose_outputs(weight, second_moment(normal(2, 1, 5)), tokens=1)
    none = decompose_outputs(torch.zeros_like(weight), torch.eye(5, dtype=torch.float64))
    silent = decompose_outputs(weight, torch.zeros(5, 5, dtype=torch.float64))
    for solved in (few, none, silent):
        factors = solved.truncate(4, split="balanced")
        for tensor in (factors.left, factors.right):
            assert bool(torch.isfinite(tensor).all())
            assert bool(torch.isfinite(tensor.float()).all())
        torch.testing.assert_close(factors.dense(), solved.target, rtol=0, atol=10 * LINALG)
    share = few.truncate(4, split="balanced").left.norm(dim=0)
    expected = (1e-6 * float(few.singular_values[0])) ** 0.5
    assert share[1:].tolist() == pytest.approx([expected] * 3, rel=1e-9)
