"""What every method promises. A new one in the registry is held to it without a line written."""

import warnings

import pytest
import torch
from torch import nn

from slimrank.errors import NumericalError, NumericalWarning, RecipeError
from slimrank.linalg import Moments, output_loss
from slimrank.methods import METHODS, Method, method_by_name
from tolerances import TOLERANCE

LOSS = TOLERANCE["loss", torch.float64]
LINALG = TOLERANCE["linalg", torch.float64]

SHAPES = {
    "square": (6, 6),
    "tall": (9, 4),
    "wide": (4, 9),
    "single row": (1, 7),
    "single column": (7, 1),
}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


def moments_of(tokens: torch.Tensor) -> Moments:
    return Moments(original=tokens.mT @ tokens / len(tokens), tokens=len(tokens))


def own_moment(method: Method, moments: Moments) -> torch.Tensor | None:
    """The moment that a method's loss is under."""
    return moments.original if method.needs_moments else None


@pytest.fixture(params=sorted(METHODS))
def method(request) -> Method:
    return method_by_name(request.param)


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request) -> tuple[int, int]:
    return request.param


@pytest.fixture
def weight(shape) -> torch.Tensor:
    return normal(1, *shape)


@pytest.fixture
def moments(shape) -> Moments:
    return moments_of(normal(2, 40, shape[1]) * (1 + torch.arange(shape[1])))


def test_it_says_what_it_is(method):
    kind = type(method)
    assert isinstance(method, Method)
    assert METHODS[kind.name] is kind
    assert isinstance(kind.needs_moments, bool)
    for text in (kind.name, kind.paper, kind.objective, kind.__doc__):
        assert isinstance(text, str)
        assert text.strip()
    assert kind.name == kind.name.lower()
    assert " " not in kind.name


def test_full_rank_is_exact(method, weight, moments):
    solved = method.decompose(weight, moments)
    rank = min(weight.shape)
    dense = solved.truncate(rank).dense()
    torch.testing.assert_close(dense, weight, rtol=0, atol=10 * LINALG)
    assert solved.loss(rank) <= LOSS * solved.energy


def test_losses_are_those_of_the_factors(method, weight, moments):
    solved = method.decompose(weight, moments)
    moment = own_moment(method, moments)
    for rank in range(min(weight.shape) + 1):
        factors = solved.truncate(rank)
        assert factors.left.shape == (weight.shape[0], rank)
        assert factors.right.shape == (rank, weight.shape[1])
        found = output_loss(weight, factors, moment)
        assert found == pytest.approx(solved.loss(rank), abs=LOSS * solved.energy)


def test_the_ends_of_the_loss(method, weight, moments):
    solved = method.decompose(weight, moments)
    assert solved.loss(0) == pytest.approx(solved.energy, rel=LOSS)
    assert solved.energy > 0
    assert 0 <= solved.loss(min(weight.shape)) <= LOSS * solved.energy
    losses = [solved.loss(rank) for rank in range(min(weight.shape) + 1)]
    assert losses == sorted(losses, reverse=True)


def test_no_random_competitor_of_the_rank_does_better(method, weight, moments):
    solved = method.decompose(weight, moments)
    moment = own_moment(method, moments)
    for rank in range(1, min(weight.shape) + 1):
        factors = solved.truncate(rank)
        for seed in range(5):
            moved = type(factors)(
                factors.left + 0.01 * normal(seed, *factors.left.shape),
                factors.right + 0.01 * normal(seed + 50, *factors.right.shape),
            )
            slack = LOSS * solved.energy
            assert output_loss(weight, moved, moment) >= solved.loss(rank) - slack


def test_inputs_are_not_changed(method, weight, moments):
    kept_weight, kept_moment = weight.clone(), moments.original.clone()
    method.decompose(weight, moments).truncate(1)
    assert torch.equal(weight, kept_weight)
    assert torch.equal(moments.original, kept_moment)


def test_the_same_bits_twice(method, weight, moments):
    first = method.decompose(weight, moments)
    second = method_by_name(method.name).decompose(weight.clone(), moments)
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.singular_values, second.singular_values)
    assert torch.equal(first.truncate(1).right, second.truncate(1).right)
    assert first.jitter == second.jitter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_low_precision_weight_is_solved_in_float64(method, weight, moments, dtype):
    low = nn.Parameter(weight.to(dtype))
    solved = method.decompose(low, moments)
    for tensor in (solved.basis, solved.target, solved.singular_values):
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
    exact = method.decompose(low.detach().double(), moments)
    assert torch.equal(solved.singular_values, exact.singular_values)
    assert torch.equal(solved.basis, exact.basis)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(method, weight, moments, value):
    weight[0, 0] = value
    with pytest.raises(NumericalError, match="weight"):
        method.decompose(weight, moments)


def test_a_singular_moment_is_survived(method, weight):
    tokens = normal(3, 2, weight.shape[1])
    moments = moments_of(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        solved = method.decompose(weight, moments)
    assert bool(torch.isfinite(solved.basis).all())
    assert bool(torch.isfinite(solved.singular_values).all())
    side = min(weight.shape)
    torch.testing.assert_close(solved.truncate(side).dense(), weight, rtol=0, atol=10 * LINALG)
    moment = own_moment(method, moments)
    # a jitter is part of the problem then, and no more than a millionth of the mean diagonal
    allowed = LOSS * solved.energy + solved.jitter * float(weight.square().sum())
    for rank in range(side + 1):
        found = output_loss(weight, solved.truncate(rank), moment)
        assert abs(found - solved.loss(rank)) <= allowed


def test_moments_that_are_needed_are_asked_for(method, weight):
    if method.needs_moments:
        with pytest.raises(ValueError, match=f"{method.name} needs moments"):
            method.decompose(weight, None)
    else:
        assert method.decompose(weight, None).energy > 0


def test_a_near_miss_of_the_name_is_told(method):
    with pytest.raises(RecipeError, match=f"did you mean '{method.name}'"):
        method_by_name(method.name + "x")
