"""Dynamic ranks are chosen on held-out text, from models that are what would be built."""

import copy

import pytest
import torch

import slimrank.search
from slimrank import CompressionOptions, LowRankLinear, TokenWindows, compress
from slimrank.allocation import swift
from slimrank.errors import NumericalError, NumericalWarning, TextError
from slimrank.evaluation import windows_perplexity
from slimrank.search import IMPORTANCE_WEIGHTS, dynamic_ranks
from slimrank.targets import find_work

# On so small a model with random weights uniform ranks may well be best.
UNIFORM_BETTER = "ignore:uniform ranks do better:slimrank.errors.NumericalWarning"
pytestmark = pytest.mark.filterwarnings(UNIFORM_BETTER)


@pytest.fixture(scope="module")
def found(make_model, make_profile):
    return make_profile(make_model("llama", num_hidden_layers=3))


@pytest.fixture
def built(make_model, make_recipe, found):
    """`built(**swift)` gives a model at a half, and its report."""

    def build(keep=0.5, **settings):
        model = make_model("llama", num_hidden_layers=3)
        recipe = make_recipe(keep=keep, allocation="swift", swift=settings)
        return model, compress(model, recipe, profile=found.folder)

    return build


@pytest.fixture(scope="module")
def searched(make_model, make_recipe, found):
    """The report of one search, which several tests read."""
    recipe = make_recipe(allocation="swift")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slimrank.search.warnings, "warn", lambda *_args, **_kwargs: None)
        return compress(make_model("llama", num_hidden_layers=3), recipe, profile=found.folder)


def scores(monkeypatch, *values):
    """Let the models of a search score so, in turn; the list tells how many were asked for."""
    left = list(values)
    real = windows_perplexity

    def score(model, windows):
        return real(model, windows).model_copy(update={"value": left.pop(0)})

    monkeypatch.setattr(slimrank.search, "windows_perplexity", score)
    return left


def never(*_arguments):
    raise AssertionError("was called")


def state_of(model):
    return copy.deepcopy(model.state_dict()), {n: id(m) for n, m in model.named_modules()}


def assert_dense(model, before):
    state, modules = before
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_eleven_trials_and_the_best_is_taken(searched, windows):
    allocation = searched.allocation
    assert [t.importance_weight for t in allocation.trials] == [
        0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
    ]  # fmt: skip
    best = min(allocation.trials, key=lambda trial: trial.perplexity)
    assert allocation.importance_weight == best.importance_weight
    held_out = TokenWindows(windows.windows[4:])
    assert allocation.held_out_tokens == held_out.tokens
    assert allocation.held_out_fingerprint == held_out.fingerprint()
    assert allocation.retained_share == 0.5
    assert len({trial.perplexity for trial in allocation.trials}) > 1


def test_the_trials_are_of_the_models_that_would_be_built(searched, built, found):
    for trial in searched.allocation.trials[::5]:
        model, report = built(importance_weight=trial.importance_weight)
        value = windows_perplexity(model, found.held_out()).value
        assert trial.perplexity == pytest.approx(value, rel=1e-5)
        if trial.importance_weight == searched.allocation.importance_weight:
            assert [x.rank for x in report.linears] == [x.rank for x in searched.linears]


def test_uniform_is_measured_beside_them(searched, make_model, make_recipe, found):
    model = make_model("llama", num_hidden_layers=3)
    report = compress(model, make_recipe(), profile=found.folder)
    value = windows_perplexity(model, found.held_out()).value
    assert searched.allocation.uniform_perplexity == pytest.approx(value, rel=1e-5)
    assert report.allocation is None
    assert [x.rank for x in report.linears] != [x.rank for x in searched.linears]


@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_the_budget_is_that_of_uniform_ranks(make_model, make_recipe, found, built, keep):
    uniform = compress(
        make_model("llama", num_hidden_layers=3), make_recipe(keep=keep), profile=found.folder
    )
    for weight in (0.0, 1.0):
        _, report = built(keep, importance_weight=weight)
        assert report.size == uniform.size
        pools = [{}, {}]
        for pool, linears in zip(pools, (report.linears, uniform.linears), strict=True):
            for linear in linears:
                kind = linear.name.split(".", 3)[3]
                pool[kind] = pool.get(kind, 0) + linear.rank
        assert pools[0] == pools[1]


def test_the_model_is_left_dense(make_model, make_recipe, found):
    model = make_model("llama", num_hidden_layers=3)
    recipe = make_recipe(allocation="swift")
    before = state_of(model)
    dynamic_ranks(model, find_work(model, recipe), recipe, found, CompressionOptions())
    assert_dense(model, before)


def test_the_model_is_left_dense_after_an_error(make_model, make_recipe, found, monkeypatch):
    def fail(model, _windows):
        assert any(isinstance(m, LowRankLinear) for m in model.modules())
        raise NumericalError("the loss of window 0 is nan")

    monkeypatch.setattr(slimrank.search, "windows_perplexity", fail)
    model = make_model("llama", num_hidden_layers=3)
    before = state_of(model)
    with pytest.raises(NumericalError, match="loss of window 0"):
        compress(model, make_recipe(allocation="swift"), profile=found.folder)
    assert_dense(model, before)


def test_a_given_weight_is_not_searched_for(built, found, monkeypatch):
    monkeypatch.setattr(slimrank.search, "windows_perplexity", never)
    _, report = built(importance_weight=0.3, retained_share=0.25)
    assert report.allocation.trials == ()
    assert report.allocation.importance_weight == 0.3
    assert report.allocation.retained_share == 0.25
    assert report.allocation.uniform_perplexity is None
    plan = swift(
        found.allocation_profiles(),
        report.recipe.budget.budget(),
        importance_weight=0.3,
        retained_share=0.25,
    )
    assert {x.name: x.rank for x in report.linears} == dict(plan.ranks)


def test_all_retained_is_uniform(built, make_model, make_recipe, found, monkeypatch):
    left = scores(monkeypatch, 5.0)
    model, report = built(retained_share=1.0)
    other = make_model("llama", num_hidden_layers=3)
    uniform = compress(other, make_recipe(), profile=found.folder)
    assert [x.rank for x in report.linears] == [x.rank for x in uniform.linears]
    state = other.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    # All plans agree, so one model is measured; its figure is everyone's.
    assert left == []
    assert {t.perplexity for t in report.allocation.trials} == {5.0}
    assert report.allocation.uniform_perplexity == 5.0


def test_the_authors_importance_moves_ranks(make_model, make_recipe, make_profile):
    model = make_model("llama", num_hidden_layers=3)
    model.model.norm.weight.data *= torch.tensor([1.0, -1.0] * 16)  # turns what it passes on
    folder = make_profile(model).folder
    reports = []
    for after_norm in (False, True):
        settings = {"importance_weight": 1.0, "importance_after_norm": after_norm}
        recipe = make_recipe(allocation="swift", swift=settings)
        reports.append(compress(copy.deepcopy(model), recipe, profile=folder))
    before, after = ([x.rank for x in report.linears] for report in reports)
    assert reports[0].size == reports[1].size
    assert sum(before[-7:]) < sum(after[-7:])


@pytest.fixture
def plans(make_model, make_recipe, found):
    """How many different plans a search at 0.8 measures when nothing is retained, uniform last."""
    model, recipe = make_model("llama", num_hidden_layers=3), make_recipe(keep=0.8)
    work, budget = find_work(model, recipe), recipe.budget.budget()
    profiles = found.allocation_profiles()
    ranks = [
        tuple(swift(profiles, budget, importance_weight=w, retained_share=0.0).ranks.values())
        for w in IMPORTANCE_WEIGHTS
    ]
    uniform = tuple(work.uniform(recipe).ranks.values())
    assert uniform not in ranks
    return len({*ranks, uniform})


def test_uniform_better_is_told(built, plans, monkeypatch):
    left = scores(monkeypatch, *(float(20 - number) for number in range(plans)))
    with pytest.warns(NumericalWarning, match="uniform ranks do better .* perplexity") as caught:
        _, report = built(0.8, retained_share=0.0)
    assert left == []
    assert str(caught[0].message) in report.warnings
    best = min(t.perplexity for t in report.allocation.trials)
    assert report.allocation.uniform_perplexity < best


@pytest.mark.filterwarnings("error:uniform ranks do better:slimrank.errors.NumericalWarning")
def test_uniform_worse_is_not(built, plans, monkeypatch):
    left = scores(monkeypatch, *(float(20 + number) for number in range(plans)))
    _, report = built(0.8, retained_share=0.0)
    assert left == []
    assert report.allocation.importance_weight == 0.0  # the first of the least
    assert report.warnings == ()


def test_no_held_out_text(make_model, make_recipe, make_profile, make_windows):
    model = make_model("llama", num_hidden_layers=3)
    one = make_windows(1, 96)
    folder = make_profile(model, windows=one).folder
    recipe = make_recipe(allocation="swift")
    with pytest.raises(TextError, match=r"holds no held-out text to choose by; .* --importance-w"):
        compress(model, recipe, profile=folder)
    given = make_recipe(allocation="swift", swift={"importance_weight": 0.5})
    assert compress(model, given, profile=folder).allocation.importance_weight == 0.5


@pytest.mark.parametrize("held_out", [0, 8])
def test_no_held_out_text_is_told_before_any_work(
    make_model, make_recipe, make_windows, monkeypatch, held_out
):
    monkeypatch.setattr("slimrank.making.write_profile", never)
    recipe = make_recipe(allocation="swift", calibration={"held_out_sequences": held_out})
    windows = make_windows(1 if held_out else 8, 96)
    with pytest.raises(TextError, match="the calibration text holds no held-out text"):
        compress(make_model("llama", num_hidden_layers=3), recipe, windows=windows)


def test_in_one_go_as_from_a_profile(
    make_model, make_recipe, make_profile, windows, tmp_path, built
):
    model = make_model("llama", num_hidden_layers=3)
    recipe = make_recipe(allocation="swift", swift={"importance_weight": 1.0})
    report = compress(model, recipe, windows=windows, out=tmp_path / "out")
    other, expected = built(importance_weight=1.0)
    state = other.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert report.allocation == expected.allocation
    assert report.calibration_fingerprint == expected.calibration_fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the profile is gone


def test_a_method_without_activations_takes_ranks_of_swift_svd(
    make_model, make_recipe, windows, searched
):
    """The search is over models by swift-svd, and only its ranks are taken."""
    model = make_model("llama", num_hidden_layers=3)
    recipe = make_recipe(method="svd", allocation="swift")
    report = compress(model, recipe, windows=windows)
    assert [x.rank for x in report.linears] == [x.rank for x in searched.linears]
    assert [x.perplexity for x in report.allocation.trials] == [
        pytest.approx(x.perplexity, rel=1e-5) for x in searched.allocation.trials
    ]
    assert report.tokens == 0
    other = make_model("llama", num_hidden_layers=3)
    for linear in report.linears:
        weight = other.get_submodule(linear.name).weight.detach().double()
        values = torch.linalg.svdvals(weight).square()
        expected = float(values[linear.rank :].sum() / values.sum())
        assert linear.predicted_loss == pytest.approx(expected, rel=1e-6)
