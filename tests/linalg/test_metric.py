import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimrank.errors import NotPositiveDefiniteError, NumericalError, NumericalWarning
from slimrank.linalg import (
    Decomposition,
    Factors,
    damped,
    decompose_in_metric,
    decompose_outputs,
    output_loss,
)
from tolerances import TOLERANCE

LOSS = TOLERANCE["loss", torch.float64]
WEIGHTS = TOLERANCE["weights", torch.float64]
LINALG = TOLERANCE["linalg", torch.float64]

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(2, 9)
TOKENS = st.integers(1, 20)
relaxed = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def diagonal(*entries: float) -> torch.Tensor:
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def second_moment(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.mT @ tokens / len(tokens)


def sized(seed: int, tokens: int, features: int) -> torch.Tensor:
    """Features that differ in size by up to 10."""
    return normal(seed, tokens, features) * (1 + 9 * normal(seed + 1, features).abs().clamp(max=1))


def measured_loss(gap: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> float:
    """Token by token and gradient by gradient: the mean of ``(g · Δ x)²``."""
    return float((gradients @ gap @ inputs.mT).square().mean())


def has_gap(solved: Decomposition, rank: int) -> bool:
    values = solved.singular_values
    following = float(values[rank]) if rank < len(values) else 0.0
    return float(values[rank - 1]) - following > 1e-3 * float(values[0])


# by hand


def test_the_metric_decides_which_output_is_kept_first():
    """Outputs of size 1 and 1.5 under a metric of 4 and 1: in it they are 2 and 1.5."""
    weight = diagonal(1.0, 1.5)
    plain = decompose_outputs(weight)
    assert plain.truncate(1).dense().tolist() == [[0.0, 0.0], [0.0, 1.5]]
    for metric in (diagonal(4.0, 1.0), torch.tensor([4.0, 1.0], dtype=torch.float64)):
        solved = decompose_in_metric(weight, torch.eye(2, dtype=torch.float64), metric)
        assert solved.singular_values.tolist() == pytest.approx([2.0, 1.5], rel=1e-14)
        assert [solved.loss(r) for r in range(3)] == pytest.approx([6.25, 2.25, 0.0], abs=1e-14)
        assert solved.truncate(1).dense().tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert (solved.jitter, solved.floor) == (0.0, 0.0)


def test_an_output_that_follows_another_is_not_kept_for_itself():
    """One gradient along (1, 1), damped: the map of rank 1 has the sum of the outputs right."""
    metric = damped(torch.ones(2, 2, dtype=torch.float64), 1e-9)
    weight = diagonal(1.0, 2.0)
    kept = decompose_in_metric(weight, None, metric).truncate(1).dense()
    torch.testing.assert_close(kept.sum(dim=0), weight.sum(dim=0), rtol=0, atol=1e-7)
    plain = decompose_outputs(weight).truncate(1).dense()
    assert float((plain.sum(dim=0) - weight.sum(dim=0)).norm()) == pytest.approx(1.0)


def test_damping_by_hand():
    given_metric = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    kept = given_metric.clone()
    assert damped(given_metric, 0.5).tolist() == [[4.0, 1.0], [1.0, 2.0]]
    assert damped(given_metric, 0.0).tolist() == given_metric.tolist()
    assert torch.equal(given_metric, kept)
    lopsided = torch.tensor([[3.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    assert damped(lopsided, 0.0).tolist() == [[3.0, 1.0], [1.0, 1.0]]
    assert damped(torch.tensor([3.0, 1.0], dtype=torch.float32), 0.5).dtype == torch.float64


# by property


@given(out=SIDES, inner=SIDES, tokens=TOKENS, gradients=TOKENS, seed=SEEDS)
@relaxed
def test_reported_loss_is_the_loss_on_tokens_and_gradients(out, inner, tokens, gradients, seed):
    weight, inputs = normal(seed, out, inner), sized(seed + 1, tokens, inner)
    errors = sized(seed + 3, gradients, out)
    share = float(errors.square().mean()) * 1e-3  # the damping, as gradients along each output
    extra = (share * (gradients + out)) ** 0.5 * torch.eye(out, dtype=torch.float64)
    stretch = ((gradients + out) / gradients) ** 0.5
    seen = torch.cat([stretch * errors, extra])
    metric = damped(second_moment(errors), 1e-3)
    moment = second_moment(inputs)
    solved = decompose_in_metric(weight, moment, metric, tokens)
    losses = solved.measured_losses(moment, metric)
    slack = LOSS * solved.energy
    for rank in range(min(out, inner) + 1):
        factors = solved.truncate(rank)
        measured = measured_loss(weight - factors.dense(), inputs, seen)
        assert solved.loss(rank) == pytest.approx(measured, abs=slack)
        assert output_loss(weight, factors, moment, metric) == pytest.approx(measured, abs=slack)
        assert float(losses[rank]) == pytest.approx(measured, abs=slack)


@given(out=SIDES, inner=SIDES, tokens=TOKENS, gradients=TOKENS, seed=SEEDS)
@relaxed
def test_no_perturbation_and_no_competitor_does_better(out, inner, tokens, gradients, seed):
    weight = normal(seed, out, inner)
    moment = second_moment(sized(seed + 1, tokens, inner))
    metric = damped(second_moment(sized(seed + 3, gradients, out)), 1e-3)
    solved = decompose_in_metric(weight, moment, metric, tokens)
    slack = LOSS * solved.energy
    for rank in range(1, min(out, inner) + 1):
        factors = solved.truncate(rank)
        for step, size in enumerate((1e-3, 0.1, 1.0)):
            moved = Factors(
                factors.left + size * normal(seed + 5 + step, out, rank),
                factors.right + size * normal(seed + 8 + step, rank, inner),
            )
            assert output_loss(weight, moved, moment, metric) >= solved.loss(rank) - slack
        # the best map onto a random column space: weighted least squares
        columns = torch.linalg.qr(normal(seed + 11, out, rank)).Q
        pulled = columns.mT @ metric
        rows = torch.linalg.solve(pulled @ columns, pulled @ weight)
        found = output_loss(weight, Factors(columns, rows), moment, metric)
        assert found >= solved.loss(rank) - slack


@given(out=SIDES, inner=SIDES, tokens=TOKENS, gradients=TOKENS, seed=SEEDS)
@relaxed
def test_full_rank_gives_the_weight_back(out, inner, tokens, gradients, seed):
    weight = normal(seed, out, inner)
    moment = second_moment(sized(seed + 1, tokens, inner))
    metric = damped(second_moment(sized(seed + 3, gradients, out)), 1e-3)
    solved = decompose_in_metric(weight, moment, metric, tokens)
    side = min(out, inner)
    assert solved.loss(side) == 0.0
    torch.testing.assert_close(solved.target, weight, rtol=0, atol=0)
    for split in ("orthonormal", "balanced"):
        dense = solved.truncate(side, split).dense()
        torch.testing.assert_close(dense, weight, rtol=0, atol=1000 * LINALG)


@given(out=SIDES, inner=SIDES, tokens=TOKENS, seed=SEEDS, scale=st.floats(1e-9, 1e9))
@relaxed
def test_an_even_metric_scales_the_loss_and_nothing_else(out, inner, tokens, seed, scale):
    weight = normal(seed, out, inner)
    moment = second_moment(sized(seed + 1, tokens, inner))
    plain = decompose_outputs(weight, moment, tokens)
    even = torch.full((out,), scale, dtype=torch.float64)
    for metric in (torch.diag(even), even):
        solved = decompose_in_metric(weight, moment, metric, tokens)
        for rank in range(min(out, inner) + 1):
            assert solved.loss(rank) == pytest.approx(
                scale * plain.loss(rank), abs=LOSS * solved.energy
            )
            if rank == 0 or not has_gap(plain, rank):
                continue
            found, expected = solved.truncate(rank).dense(), plain.truncate(rank).dense()
            torch.testing.assert_close(found, expected, rtol=0, atol=WEIGHTS * float(weight.norm()))


@given(out=SIDES, inner=SIDES, tokens=TOKENS, gradients=TOKENS, seed=SEEDS)
@relaxed
def test_turned_outputs_turn_the_map(out, inner, tokens, gradients, seed):
    weight = normal(seed, out, inner)
    moment = second_moment(sized(seed + 1, tokens, inner))
    errors = sized(seed + 3, gradients, out)
    turn = torch.linalg.qr(normal(seed + 5, out, out)).Q
    plain = decompose_in_metric(weight, moment, damped(second_moment(errors), 1e-3), tokens)
    metric = damped(second_moment(errors @ turn.mT), 1e-3)
    turned = decompose_in_metric(turn @ weight, moment, metric, tokens)
    for rank in range(1, min(out, inner) + 1):
        assert turned.loss(rank) == pytest.approx(plain.loss(rank), abs=LOSS * plain.energy)
        if has_gap(plain, rank):
            found, expected = turned.truncate(rank).dense(), turn @ plain.truncate(rank).dense()
            torch.testing.assert_close(found, expected, rtol=0, atol=WEIGHTS * float(weight.norm()))


@given(out=SIDES, inner=SIDES, tokens=TOKENS, seed=SEEDS)
@relaxed
def test_a_diagonal_may_be_given_as_a_vector(out, inner, tokens, seed):
    weight = normal(seed, out, inner)
    moment = second_moment(sized(seed + 1, tokens, inner))
    weights = 0.01 + normal(seed + 2, out).square()
    short = decompose_in_metric(weight, moment, weights, tokens)
    long = decompose_in_metric(weight, moment, torch.diag(weights), tokens)
    for rank in range(min(out, inner) + 1):
        assert short.loss(rank) == pytest.approx(long.loss(rank), abs=LOSS * long.energy)
        factors = short.truncate(rank)
        told = [output_loss(weight, factors, moment, g) for g in (weights, torch.diag(weights))]
        assert told[0] == pytest.approx(told[1], abs=LOSS * long.energy)
        assert told[0] == pytest.approx(short.loss(rank), abs=LOSS * long.energy)
    torch.testing.assert_close(
        short.measured_losses(moment, weights),
        short.measured_losses(moment, torch.diag(weights)),
        rtol=0,
        atol=LOSS * long.energy,
    )


# what a decomposition in a metric is made of


@given(out=SIDES, inner=SIDES, gradients=TOKENS, seed=SEEDS)
@relaxed
def test_basis_and_dual_are_biorthonormal(out, inner, gradients, seed):
    weight, side = normal(seed, out, inner), min(out, inner)
    metric = damped(second_moment(sized(seed + 1, gradients, out)), 1e-3)
    solved = decompose_in_metric(weight, None, metric)
    assert solved.basis.shape == solved.dual.shape == (out, side)
    eye = torch.eye(side, dtype=torch.float64)
    torch.testing.assert_close(solved.dual.mT @ solved.basis, eye, rtol=0, atol=1000 * LINALG)
    # orthonormal in the metric
    gram = solved.basis.mT @ metric @ solved.basis
    torch.testing.assert_close(gram, eye, rtol=0, atol=1000 * LINALG)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_factors_do_not_depend_on_the_unit_of_the_metric(unit):
    """The loss of a model has gradients of any size; factors are stored in 16 bits."""
    weight, metric = normal(1, 6, 8), damped(second_moment(sized(2, 30, 6)), 1e-3)
    for split in ("orthonormal", "balanced"):
        one = decompose_in_metric(weight, None, metric).truncate(4, split)
        other = decompose_in_metric(weight, None, unit * metric).truncate(4, split)
        torch.testing.assert_close(other.left, one.left, rtol=0, atol=WEIGHTS)
        torch.testing.assert_close(other.right, one.right, rtol=0, atol=WEIGHTS)
    lengths = decompose_in_metric(weight, None, metric).truncate(4).left.norm(dim=0)
    assert lengths.tolist() == pytest.approx([1.0] * 4)


@given(out=SIDES, inner=SIDES, seed=SEEDS)
@relaxed
def test_a_balanced_split_gives_both_factors_the_same_size(out, inner, seed):
    """Columns of the left factor by their norm, latents by their root mean square."""
    weight, moment = normal(seed, out, inner), second_moment(sized(seed + 1, 40, inner))
    metric = damped(second_moment(sized(seed + 3, 40, out)), 1e-3)
    solved = decompose_in_metric(weight, moment, metric)
    assume(has_gap(solved, min(out, inner)))
    plain, factors = (
        solved.truncate(min(out, inner), split) for split in ("orthonormal", "balanced")
    )
    torch.testing.assert_close(factors.dense(), plain.dense(), rtol=0, atol=1000 * LINALG)
    carried = ((factors.right @ moment) * factors.right).sum(dim=1).sqrt()
    torch.testing.assert_close(factors.left.norm(dim=0), carried, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_shortened_keeps_what_a_rank_needs(shape):
    weight, moment = normal(1, *shape), second_moment(sized(2, 40, shape[1]))
    metric = damped(second_moment(sized(3, 40, shape[0])), 1e-3)
    solved = decompose_in_metric(weight, moment, metric)
    short = solved.shortened(4, torch.float32)
    assert short.basis.dtype == short.dual.dtype == torch.float32
    assert short.basis.shape == short.dual.shape == (shape[0], 4)
    for rank in range(5):
        found = output_loss(weight, short.truncate(rank), moment, metric)
        assert found == pytest.approx(solved.loss(rank), abs=1e-11 * solved.energy)
    rough = solved.shortened(4, torch.bfloat16)  # so that the rounding shows
    told = rough.measured_losses(moment, metric)
    expected = [output_loss(weight, rough.truncate(r), moment, metric) for r in range(5)]
    assert told.tolist() == pytest.approx(expected, abs=LOSS * solved.energy)
    assert expected[4] > solved.loss(4) + 1e-8 * solved.energy


# too few gradients


@given(out=st.integers(3, 9), inner=st.integers(3, 9), data=st.data(), seed=SEEDS)
@relaxed
def test_few_gradients_do_not_end_the_spectrum(out, inner, data, seed):
    """Rank collapse: undamped, the spectrum ends at the number of gradients, whatever the rest."""
    side = min(out, inner)
    few = data.draw(st.integers(1, side - 1), label="gradients")
    weight, moment = normal(seed, out, inner), second_moment(sized(seed + 1, 40, inner))
    errors = sized(seed + 3, few, out)
    bare = second_moment(errors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        collapsed = decompose_in_metric(weight, moment, bare)
    assert collapsed.loss(few) <= 1e-8 * collapsed.energy
    metric = damped(bare, 1e-3)
    solved = decompose_in_metric(weight, moment, metric)
    assert solved.jitter == 0.0
    losses = [solved.loss(rank) for rank in range(side + 1)]
    assert all(after < before for before, after in pairwise(losses))
    assert float(solved.singular_values[-1]) > 1e-6 * float(solved.singular_values[few - 1])
    dense = solved.truncate(side).dense()
    torch.testing.assert_close(dense, weight, rtol=0, atol=1000 * LINALG)
    # the gradients that were seen are still served first
    left = output_loss(weight, solved.truncate(few), moment, bare)
    assert left <= solved.loss(few)
    assert solved.loss(few) <= float(damping_share(bare)) * output_energy(weight, moment)


def damping_share(metric: torch.Tensor) -> torch.Tensor:
    """What 1e-3 adds to the diagonal: no direction without a gradient costs more than this."""
    return 1e-3 * metric.diagonal().mean()


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    return float(((weight @ moment) * weight).sum())


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_the_damped_solution_goes_over_to_that_of_no_metric(shape):
    weight, moment = normal(1, *shape), second_moment(sized(2, 40, shape[1]))
    bare = second_moment(sized(3, 2, shape[0]))
    plain = decompose_outputs(weight, moment)
    far = decompose_in_metric(weight, moment, damped(bare, 1e9))
    none = decompose_in_metric(weight, moment, damped(torch.zeros_like(bare), 1e-3))
    for rank in range(1, 5):
        expected = plain.truncate(rank).dense()
        torch.testing.assert_close(far.truncate(rank).dense(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(none.truncate(rank).dense(), expected, rtol=0, atol=WEIGHTS)
    assert 0 < none.loss(1) < 1e-20  # nobody saw a gradient, so nothing is lost


def test_a_singular_metric_gets_a_jitter_and_says_so():
    weight, bare = normal(1, 5, 7), second_moment(sized(2, 2, 5))
    with pytest.warns(NumericalWarning, match="singular"):
        solved = decompose_in_metric(weight, None, bare)
    assert solved.jitter > 0.0
    raised = bare + solved.jitter * torch.eye(5, dtype=torch.float64)
    for rank in range(6):
        loss = output_loss(weight, solved.truncate(rank), None, raised)
        assert loss == pytest.approx(solved.loss(rank), abs=1e-6 * solved.energy)


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    weight, moment = normal(1, 3, 4), torch.eye(4, dtype=torch.float64)
    for metric in (torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
        bad = metric.clone()
        bad.view(-1)[0] = value
        for refuse in (
            lambda bad=bad: damped(bad, 0.1),
            lambda bad=bad: decompose_in_metric(weight, moment, bad),
        ):
            with pytest.raises(NumericalError, match="the output metric holds 1 entries"):
                refuse()
        for what, first, second in (
            ("weight", value * weight, moment),
            ("second moment", weight, value * moment),
        ):
            with pytest.raises(NumericalError, match=f"the {what} holds"):
                decompose_in_metric(first, second, metric)


def test_a_metric_with_no_root_is_refused():
    with pytest.raises(NotPositiveDefiniteError, match="no Cholesky root"):
        decompose_in_metric(normal(1, 2, 3), None, diagonal(1.0, -1.0))
    with pytest.raises(NotPositiveDefiniteError, match="2 of 3 outputs have no weight"):
        decompose_in_metric(normal(1, 3, 3), None, torch.tensor([0.0, 1.0, -1.0]))
