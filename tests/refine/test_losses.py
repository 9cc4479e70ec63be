"""Squared errors in a metric: what the identity gives, what is ignored, what the unit is."""

import copy

import pytest
import torch

from slimrank.errors import NumericalError
from slimrank.recipe import RefineRecipe
from slimrank.refine import refine_block
from slimrank.refine.data import metric_variance, target_variance
from slimrank.refine.losses import SquaredError
from tolerances import TOLERANCE

CLOSE = TOLERANCE["weights", torch.float64]
WIDTH = 32


def random_metric(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(WIDTH, 3 * WIDTH, generator=generator, dtype=torch.float64)
    return rows @ rows.mT / 50


def errors_of(block, pairs):
    """Of each feature, over all tokens."""
    with torch.no_grad():
        pairs_of = zip(pairs.inputs, pairs.targets, strict=True)
        errors = [block(x[None], **pairs.calls(len(x))[1])[0] - y for x, y in pairs_of]
    return torch.cat(errors)


def settings_of(**others):
    return RefineRecipe(**{"preset": "paper", "epochs": 3, "batch_sequences": 4, **others})


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("metric", [torch.eye(WIDTH), 7 * torch.eye(WIDTH), torch.zeros(32, 32)])
def test_a_metric_that_is_a_multiple_of_the_identity_is_none(make_pairs, metric, scale):
    plain, pairs = make_pairs()
    weighted = copy.deepcopy(plain)
    rate = {"scale_loss": scale, "learning_rate": 1e-3}
    expected = refine_block(plain, pairs, pairs, settings_of(**rate), 0)
    given = settings_of(loss="gradient", **rate)
    found = refine_block(weighted, pairs, pairs, given, 0, metric=metric)
    assert (found.loss, expected.loss) == ("gradient", "mse")
    assert found.start_loss == pytest.approx(expected.start_loss)
    for left, right in zip(found.epochs, expected.epochs, strict=True):
        assert left.loss == pytest.approx(right.loss)
        assert left.held_out_loss == pytest.approx(right.held_out_loss)
    for left, right in zip(plain.parameters(), weighted.parameters(), strict=True):
        assert (left - right).norm() <= CLOSE * (1 + left.norm())


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_losses_by_hand(make_pairs, damping):
    block, pairs = make_pairs(lengths=(8, 8, 4))
    metric = random_metric()
    mean = metric.diagonal().mean()
    weights = (metric / mean + damping * torch.eye(WIDTH)) / (1 + damping)
    errors, targets = errors_of(block, pairs), torch.cat(pairs.targets)
    away = targets - targets.mean()
    expected = ((errors @ weights) * errors).sum() / ((away @ weights) * away).sum()
    settings = settings_of(loss="gradient", damping=damping, epochs=1)
    report = refine_block(block, pairs, pairs, settings, 0, metric=metric)
    assert report.start_loss == pytest.approx(float(expected))
    assert report.start_held_out_loss == pytest.approx(float(expected))


def test_features_that_a_metric_ignores_give_way_to_the_others(make_pairs):
    """With down_proj and o_proj of low rank and nothing else to train, features compete."""
    half = WIDTH // 2
    left = []
    for loss in ("mse", "gradient"):
        block, pairs = make_pairs(dense=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        settings = settings_of(epochs=60, learning_rate=5e-3, trains=["factors"], loss=loss)
        metric = torch.diag((torch.arange(WIDTH) < half).double())
        refine_block(block, pairs, None, settings, 0, metric=metric)
        left.append(errors_of(block, pairs).square().sum(0))
    assert left[1][:half].sum() < 0.8 * left[0][:half].sum()
    assert left[1][half:].sum() > 1.2 * left[0][half:].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_the_root_are_not_rounded_to_the_models_dtype(make_pairs, dtype):
    block, pairs = make_pairs(dtype=dtype)
    measure = SquaredError.in_metric(pairs, 0, random_metric(), 0.1)
    (batch,) = pairs.again(size=6).micro_batches(range(6))
    total, elements = measure.total(block, batch)
    with torch.no_grad():
        plain, _ = SquaredError(1.0, torch.eye(WIDTH)).total(block, batch)
        exact, _ = SquaredError(1.0).total(block, batch)
    assert total.dtype == torch.float32
    assert elements == 6 * 8 * WIDTH
    assert float(plain) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 5, 3)])
def test_the_variance_in_the_identity_is_the_targets_own(make_pairs, lengths):
    _, pairs = make_pairs(lengths=lengths)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    assert metric_variance(pairs, eye) == pytest.approx(target_variance(pairs))
    turned, _ = torch.linalg.qr(random_metric())
    assert metric_variance(pairs, turned) == pytest.approx(target_variance(pairs))


def test_targets_that_no_metric_can_be_a_share_of(make_pairs):
    _, pairs = make_pairs()
    for change, what in ((torch.ones_like, "all equal"), (lambda t: t / 0, "not all finite")):
        spoilt = pairs.again(targets=[change(target) for target in pairs.targets])
        with pytest.raises(NumericalError, match=f"block 5: the original block's .* {what}"):
            SquaredError.in_metric(spoilt, 5, random_metric(), 0.1)


def test_a_metric_that_is_not_finite(make_pairs):
    _, pairs = make_pairs()
    metric = random_metric()
    metric[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="output metric holds 1 entries"):
        SquaredError.in_metric(pairs, 0, metric, 0.1)


def test_a_loss_without_its_metric(make_pairs):
    block, pairs = make_pairs()
    with pytest.raises(ValueError, match="'gradient' needs the metric"):
        refine_block(block, pairs, None, settings_of(loss="gradient"), 0)
