"""The schedule by hand, and steps against plain loops of torch."""

import copy
import math

import pytest
import torch
from torch import nn

from slimrank.recipe import RefineRecipe
from slimrank.refine import learning_rate, refine_block
from tolerances import TOLERANCE

CLOSE = TOLERANCE["weights", torch.float64]


def values_of(block):
    return torch.cat([p.detach().flatten() for p in block.parameters()])


def distance(left, right):
    return float((values_of(left) - values_of(right)).norm() / values_of(left).norm())


def plain_loop(block, pairs, epochs, batch, clip, weight_decay=0.01):
    """AA-SVD's loop: whole batches in a fixed order, the rate given to each step."""
    block.requires_grad_(True)
    trained = [p for name, p in block.named_parameters() if p.numel()]
    optimizer = torch.optim.AdamW(trained, weight_decay=weight_decay)
    starts = range(0, pairs.num_sequences, batch)
    steps = epochs * len(starts)
    warmup = round(0.1 * steps)
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if step >= warmup:
            done = (step + 1 - warmup) / (steps - warmup)
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = 1e-4 * rate
        start = batch * (step % len(starts))
        args, kwargs = pairs.calls(len(pairs.inputs[0]))
        outputs = block(torch.stack(pairs.inputs[start : start + batch]), *args, **kwargs)
        optimizer.zero_grad()
        nn.functional.mse_loss(
            outputs, torch.stack(pairs.targets[start : start + batch])
        ).backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()


def test_rates_by_hand():
    settings = RefineRecipe(preset="paper", learning_rate=1.0)  # 10 % up, cosine to 10 %
    rates = [learning_rate(step, 20, settings) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[10] == pytest.approx(0.1 + 0.9 * 0.5)  # 9 of 18 steps down
    assert rates[4] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(3) / 2) / 2)  # 3 of 18: 30 degrees
    assert rates[19] == pytest.approx(0.1)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_rates_at_the_ends_of_their_settings():
    flat = RefineRecipe(preset="paper", learning_rate=2.0, warmup=0, final_learning_rate=1)
    assert [learning_rate(step, 3, flat) for step in range(3)] == [2.0] * 3
    one = RefineRecipe(preset="paper", learning_rate=2.0)
    assert learning_rate(0, 1, one) == pytest.approx(0.2)
    long = RefineRecipe(preset="paper", learning_rate=2.0, warmup=0.99)
    assert [learning_rate(step, 4, long) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("clip", [1.0, 1e-9])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_paper_preset_is_a_plain_loop(make_pairs, family, clip):
    """A gradient clipped to less than AdamW's eps moves less: so it shows what is clipped."""
    block, pairs = make_pairs(family)
    expected, start = copy.deepcopy(block), copy.deepcopy(block)
    plain_loop(expected, pairs, epochs=3, batch=4, clip=clip)
    settings = RefineRecipe(preset="paper", epochs=3, batch_sequences=4, clip_norm=clip)
    refine_block(block, pairs, None, settings, 0)
    assert distance(block, expected) < CLOSE
    assert distance(block, start) > 100 * CLOSE


@pytest.mark.parametrize("clip", [None, 1e-9])
@pytest.mark.parametrize("lengths", [(8,) * 7, (8, 3, 8, 5, 3, 8, 8)])
def test_micro_batches_do_not_matter(make_pairs, lengths, clip):
    settings = RefineRecipe(
        preset="paper", epochs=3, batch_sequences=4, clip_norm=clip, scale_loss=True
    )
    blocks = []
    for size in (1, 3, 7):
        block, pairs = make_pairs(lengths=lengths)
        refine_block(block, pairs.again(size), None, settings, 0)
        blocks.append(block)
    assert distance(blocks[0], blocks[1]) < CLOSE
    assert distance(blocks[0], blocks[2]) < CLOSE


def test_clipping_moves_less(make_pairs):
    moved = []
    for clip in (None, 1e-9):
        block, pairs = make_pairs()
        start = copy.deepcopy(block)
        settings = RefineRecipe(preset="paper", epochs=2, clip_norm=clip, weight_decay=0)
        refine_block(block, pairs, None, settings, 0)
        moved.append(distance(start, block))
    assert 0 < moved[1] < 0.1 * moved[0]


def test_a_scaled_loss_has_a_parallel_gradient_and_the_same_report(make_pairs, monkeypatch):
    seen = []
    monkeypatch.setattr(
        nn.utils,
        "clip_grad_norm_",
        lambda trained, _: (
            seen.append(torch.cat([p.grad.flatten() for p in trained])) or torch.ones(())
        ),
    )
    reports = []
    for scale in (False, True):
        block, pairs = make_pairs()
        settings = RefineRecipe(preset="paper", epochs=1, scale_loss=scale)
        reports.append(refine_block(block, pairs, None, settings, 0))
    plain, scaled = seen
    variance = float(torch.stack(pairs.targets).var(correction=0))
    assert (plain / variance - scaled).norm() < CLOSE * scaled.norm()
    assert reports[0].start_loss == reports[1].start_loss
    assert reports[0].epochs[0].loss == reports[1].epochs[0].loss


def test_losses_are_shares_of_the_variance(make_pairs):
    block, pairs = make_pairs(lengths=(8, 8, 4))
    with torch.no_grad():
        errors = [
            block(x[None], **pairs.calls(len(x))[1])[0] - y
            for x, y in zip(pairs.inputs, pairs.targets, strict=True)
        ]
    expected = torch.cat(errors).square().mean() / torch.cat(pairs.targets).var(correction=0)
    double = pairs.again(targets=[2 * target for target in pairs.targets])
    report = refine_block(block, pairs, double, RefineRecipe(preset="paper", epochs=1), 0)
    assert report.start_loss == pytest.approx(float(expected))
    assert report.epochs[0].loss == pytest.approx(float(expected))  # its one step began there
    assert report.start_held_out_loss > 1  # of the calibration's variance too


def test_orders_are_drawn_from_seed_and_block(make_pairs):
    def refined(shuffle, seed=0, index=0):
        block, pairs = make_pairs()
        settings = RefineRecipe(
            preset="paper", epochs=2, batch_sequences=2, shuffle=shuffle, seed=seed
        )
        refine_block(block, pairs, None, settings, index)
        return values_of(block)

    assert torch.equal(refined(False), refined(False, seed=1, index=1))
    drawn = refined(True)
    assert torch.equal(drawn, refined(True))
    for other in (refined(False), refined(True, seed=1), refined(True, index=1)):
        assert not torch.equal(drawn, other)


def test_each_epoch_takes_each_sequence_once_in_an_order_of_its_own(make_pairs):
    block, pairs = make_pairs()
    asked = []
    given = pairs.micro_batches

    def watched(sequences):
        asked.append(list(sequences))
        return given(sequences)

    pairs.micro_batches = watched
    settings = RefineRecipe(preset="paper", epochs=2, batch_sequences=4, shuffle=True)
    refine_block(block, pairs, None, settings, 0)
    *whole, a, b, c, d = asked
    assert all(numbers == [*range(6)] for numbers in whole)
    assert [len(numbers) for numbers in (a, b, c, d)] == [4, 2, 4, 2]
    assert sorted(a + b) == sorted(c + d) == [*range(6)]
    assert a + b != c + d
