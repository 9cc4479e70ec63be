"""What every method promises. A new one in the registry is held to it without a line written."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from slimrank.errors import NumericalError, NumericalWarning, RecipeError
from slimrank.linalg import Decomposition, Factors, Moments
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
STREAMS = {"original", "shifted"}
NEEDS = STREAMS | {"gradients", "weight_gradients", "magnitudes"}
FIELDS = {  # of moments: which need reads it, and what it is called where it is refused
    "original": ("original", "second moment"),
    "shifted": ("shifted", "second moment"),
    "drift": ("drift", "drift"),
    "metric": ("gradients", "output metric"),
    "row_weights": ("weight_gradients", "output metric"),
    "magnitudes": ("magnitudes", "magnitudes"),
}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Data:
    """What a method may know of one linear, before any moment is taken of it."""

    x: torch.Tensor  # (tokens, in)
    z: torch.Tensor  # (tokens, in), what arrives of the same tokens
    gradients: torch.Tensor  # (gradients, out), by the outputs
    row_gradients: torch.Tensor  # (out, sequences), norms of a row of the weight's gradient

    @property
    def is_shifted(self) -> bool:
        return not torch.equal(self.x, self.z)

    def moments(self) -> Moments:
        """By their definition."""
        x, z, tokens = self.x, self.z, len(self.x)
        return Moments(
            original=x.mT @ x / tokens,
            tokens=tokens,
            shifted=z.mT @ z / tokens if self.is_shifted else None,
            drift=(x - z).mT @ z / tokens if self.is_shifted else None,
            metric=self.gradients.mT @ self.gradients / len(self.gradients),
            row_weights=self.row_gradients.square().mean(dim=1),
            magnitudes=x.abs().mean(dim=0),
        )


def data_of(tokens: int, shape: tuple[int, int], shifted: bool) -> Data:
    """As many gradients as tokens; sizes of features and outputs differ."""
    out, features = shape
    x = normal(2, tokens, features) * (1 + torch.arange(features))
    return Data(
        x=x,
        z=shifted_from(x) if shifted else x,
        gradients=normal(3, tokens, out) * (1 + torch.arange(out)),
        row_gradients=normal(4, out, 3) * (1 + torch.arange(out))[:, None],
    )


def shifted_from(x: torch.Tensor) -> torch.Tensor:
    """What errors upstream make of the tokens: turned, shrunk, and with noise of their own."""
    features = x.shape[1]
    return 0.7 * x + 0.3 * x @ normal(8, features, features) / features + normal(9, *x.shape)


def is_anchored(method: Method) -> bool:
    """Whether it wants the outputs of other inputs than those it is given."""
    return method.needs >= STREAMS


def measured_loss(method: Method, weight: torch.Tensor, dense: torch.Tensor, data: Data) -> float:
    """The objective that goes with what a method looks at: token by token, gradient by gradient."""
    if method.needs & STREAMS:
        wanted = data.x if "original" in method.needs else data.z
        given = data.z if "shifted" in method.needs else data.x
        gaps = (wanted @ weight.mT - given @ dense.mT) / len(data.x) ** 0.5
    else:
        gaps = (weight - dense).mT
        if "magnitudes" in method.needs:
            gaps = data.x.abs().mean(dim=0).pow(method.alpha)[:, None] * gaps
    if "gradients" in method.needs:
        energy = float(data.gradients.square().mean())
        told = (gaps @ data.gradients.mT).square().sum() / len(data.gradients)
        return float(told + method.damping * energy * gaps.square().sum())
    if "weight_gradients" in method.needs:
        weights = data.row_gradients.square().mean(dim=1)
        return float((gaps.square() * (weights + 1e-6 * weights.mean())).sum())
    return float(gaps.square().sum())


def best_map(method: Method, weight: torch.Tensor, data: Data) -> torch.Tensor:
    """The map that a method would choose if the rank were free."""
    if not is_anchored(method):
        return weight
    return torch.linalg.lstsq(data.z, data.x @ weight.mT).solution.mT


@pytest.fixture(params=sorted(METHODS))
def method(request) -> Method:
    return method_by_name(request.param)


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request) -> tuple[int, int]:
    return request.param


@pytest.fixture
def weight(shape) -> torch.Tensor:
    return normal(1, *shape)


@pytest.fixture(params=["equal", "shifted"])
def data(request, shape) -> Data:
    return data_of(40, shape, request.param == "shifted")


@pytest.fixture
def moments(data) -> Moments:
    return data.moments()


@pytest.fixture
def solved(method, weight, moments) -> Decomposition:
    return method.decompose(weight, moments)


def test_there_are_nine_and_each_objective_of_the_literature_among_them():
    assert {frozenset(kind.needs) for kind in METHODS.values()} == {
        frozenset(),
        frozenset({"original"}),
        frozenset({"shifted"}),
        frozenset(STREAMS),
        frozenset({"weight_gradients"}),
        frozenset({"magnitudes"}),
        frozenset({"original", "gradients"}),
        frozenset({"original", "shifted", "gradients"}),
    }
    assert len(METHODS) == 9


def test_it_says_what_it_is(method):
    kind = type(method)
    assert isinstance(method, Method)
    assert METHODS[kind.name] is kind
    assert isinstance(kind.needs, frozenset)
    assert kind.needs <= NEEDS
    assert isinstance(kind.default_ridge, float)
    assert 0 <= kind.default_ridge < 1
    for text in (kind.name, kind.paper, kind.objective, kind.__doc__):
        assert isinstance(text, str)
        assert text.strip()
    assert kind.name == kind.name.lower()
    assert " " not in kind.name


def test_full_rank_is_the_best_map(method, weight, data, solved):
    """The weight itself, or, for outputs of other inputs, least squares on the tokens."""
    rank = min(weight.shape)
    expected = best_map(method, weight, data)
    size = float(expected.norm())
    dense = solved.truncate(rank).dense()
    torch.testing.assert_close(dense, expected, rtol=0, atol=10 * LINALG * max(size, 1))
    floor = measured_loss(method, weight, expected, data)
    assert solved.loss(rank) == pytest.approx(floor, abs=LOSS * solved.energy)
    assert solved.floor == pytest.approx(floor, abs=LOSS * solved.energy)


def test_only_the_outputs_of_other_inputs_leave_a_floor(method, data, solved):
    if data.is_shifted and is_anchored(method):
        assert solved.floor > 1e-3 * solved.energy
    else:
        assert solved.floor == 0.0


def test_losses_are_those_of_the_factors(method, weight, data, moments, solved):
    for rank in range(min(weight.shape) + 1):
        factors = solved.truncate(rank)
        assert factors.left.shape == (weight.shape[0], rank)
        assert factors.right.shape == (rank, weight.shape[1])
        told = method.loss(weight, factors, moments)
        measured = measured_loss(method, weight, factors.dense(), data)
        assert told == pytest.approx(solved.loss(rank), abs=LOSS * solved.energy)
        assert measured == pytest.approx(solved.loss(rank), abs=LOSS * solved.energy)


def test_the_loss_of_any_factors_is_the_loss_on_the_tokens(method, weight, data, moments):
    for rank in (1, min(weight.shape)):
        factors = Factors(normal(5, weight.shape[0], rank), normal(6, rank, weight.shape[1]))
        measured = measured_loss(method, weight, factors.dense(), data)
        assert method.loss(weight, factors, moments) == pytest.approx(measured, rel=LOSS)


def test_the_ends_of_the_loss(method, weight, data, solved):
    assert solved.loss(0) == pytest.approx(solved.energy, rel=LOSS)
    nothing = measured_loss(method, weight, torch.zeros_like(weight), data)
    assert solved.energy == pytest.approx(nothing, rel=LOSS)
    assert solved.energy > 0
    losses = [solved.loss(rank) for rank in range(min(weight.shape) + 1)]
    assert 0 <= losses[-1] <= solved.floor + LOSS * solved.energy
    assert losses == sorted(losses, reverse=True)


def test_no_random_competitor_of_the_rank_does_better(method, weight, data, moments, solved):
    slack = LOSS * solved.energy
    for rank in range(1, min(weight.shape) + 1):
        factors = solved.truncate(rank)
        for seed in range(5):
            for size in (0.01, 1.0):
                moved = Factors(
                    factors.left + size * normal(seed, *factors.left.shape),
                    factors.right + size * normal(seed + 50, *factors.right.shape),
                )
                assert method.loss(weight, moved, moments) >= solved.loss(rank) - slack
            columns = torch.linalg.qr(normal(seed + 100, weight.shape[0], rank)).Q
            target = best_map(method, weight, data)  # the best of its random column space
            found = measured_loss(method, weight, columns @ (columns.mT @ target), data)
            assert found >= solved.loss(rank) - slack


def test_inputs_are_not_changed(method, weight, moments):
    tensors = (weight, *(getattr(moments, field) for field in FIELDS))
    given = [tensor for tensor in tensors if tensor is not None]
    kept = [tensor.clone() for tensor in given]
    factors = method.decompose(weight, moments).truncate(1)
    method.loss(weight, factors, moments)
    for tensor, before in zip(given, kept, strict=True):
        assert torch.equal(tensor, before)


def test_the_same_bits_twice(method, weight, moments, solved):
    second = method_by_name(method.name).decompose(weight.clone(), moments)
    assert torch.equal(solved.basis, second.basis)
    assert torch.equal(solved.singular_values, second.singular_values)
    assert torch.equal(solved.truncate(1).left, second.truncate(1).left)
    assert torch.equal(solved.truncate(1).right, second.truncate(1).right)
    assert (solved.jitter, solved.floor) == (second.jitter, second.floor)


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
    assert solved.floor == exact.floor
    factors = solved.truncate(1)
    assert method.loss(low, factors, moments) == method.loss(low.double(), factors, moments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(method, weight, moments, value):
    weight[0, 0] = value
    with pytest.raises(NumericalError, match="weight"):
        method.decompose(weight, moments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", FIELDS)
def test_a_moment_that_is_not_finite_is_refused_or_not_looked_at(method, weight, field, value):
    moments = data_of(40, tuple(weight.shape), shifted=True).moments()
    bad = getattr(moments, field).clone()
    bad.view(-1)[0] = value
    spoilt = replace(moments, **{field: bad})
    looked_at = method.needs | ({"drift"} if is_anchored(method) else set())
    need, called = FIELDS[field]
    if need in looked_at:
        with pytest.raises(NumericalError, match=f"the {called}.* holds 1 entries"):
            method.decompose(weight, spoilt)
    else:
        found, clean = method.decompose(weight, spoilt), method.decompose(weight, moments)
        assert torch.equal(found.basis, clean.basis)
        assert torch.equal(found.singular_values, clean.singular_values)
        factors = clean.truncate(1)
        assert method.loss(weight, factors, spoilt) == method.loss(weight, factors, moments)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_a_singular_moment_is_survived(method, weight, is_shifted):
    """Two tokens: their outputs are reproduced, and the weight says the rest."""
    data = data_of(2, tuple(weight.shape), is_shifted)
    moments = data.moments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        solved = method.decompose(weight, moments)
    for tensor in (solved.basis, solved.singular_values, solved.target):
        assert bool(torch.isfinite(tensor).all())
    side = min(weight.shape)
    dense = solved.truncate(side).dense()
    torch.testing.assert_close(dense, solved.target, rtol=0, atol=10 * LINALG)
    if not (is_anchored(method) and is_shifted):
        torch.testing.assert_close(dense, weight, rtol=0, atol=10 * LINALG)
    # a jitter is part of the problem then, and no more than a millionth of the mean diagonal
    allowed = LOSS * solved.energy + solved.jitter * float(weight.square().sum())
    for rank in range(side + 1):
        factors = solved.truncate(rank)
        assert abs(method.loss(weight, factors, moments) - solved.loss(rank)) <= allowed
        measured = measured_loss(method, weight, factors.dense(), data)
        assert abs(measured - solved.loss(rank)) <= allowed


def test_moments_that_are_needed_are_asked_for(method, weight, moments):
    factors = method.decompose(weight, moments).truncate(1)
    if not method.needs:
        assert method.decompose(weight, None).energy > 0
        assert method.loss(weight, factors, None) == method.loss(weight, factors, moments)
        return
    for missing in (None, Moments(None, 0)):
        with pytest.raises(ValueError, match=f"{method.name} needs moments"):
            method.decompose(weight, missing)
        with pytest.raises(ValueError, match=f"{method.name} needs moments"):
            method.loss(weight, factors, missing)


def test_a_near_miss_of_the_name_is_told(method):
    with pytest.raises(RecipeError, match=f"did you mean '{method.name}'"):
        method_by_name(method.name + "x")
