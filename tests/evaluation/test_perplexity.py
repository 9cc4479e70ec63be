"""Perplexity against a direct computation, with nothing skipped."""

import math

import pytest
import torch
from torch import nn

from slimrank.calibration import TokenWindows
from slimrank.errors import NumericalError, TextError
from slimrank.evaluation import EvalResult, perplexity, windows_perplexity
from slimrank.evaluation import perplexity as measure


@pytest.fixture
def ids():
    return torch.randint(4, 96, (103,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def losses_of(model, windows):
    """Loss of each predicted token, by log-softmax in float64."""
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        logs = logits.log_softmax(-1)
        losses.append(torch.stack([-logs[i, window[i + 1]] for i in range(len(window) - 1)]))
    return losses


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "qwen2_tied"])
@pytest.mark.parametrize("length", [10, 25, 103])
def test_against_a_direct_computation(family, make_model, ids, length):
    model = make_model(family)
    losses = losses_of(model, [w for w in ids.split(length) if len(w) > 1])
    result = perplexity(model, ids, length)
    every = torch.cat(losses)
    assert result.tokens == len(every)
    assert result.windows == len(losses)
    assert result.skipped == 0
    assert result.sequence_length == length
    assert result.mean_loss == pytest.approx(float(every.mean()), rel=1e-6)
    assert result.value == pytest.approx(math.exp(float(every.mean())), rel=1e-6)


def test_the_standard_error_is_over_windows(make_model, ids):
    model = make_model("llama")
    losses = losses_of(model, ids[:100].split(10))
    result = perplexity(model, ids[:100], 10)
    means = torch.stack([loss.mean() for loss in losses])
    expected = result.value * float(means.std(correction=0)) / math.sqrt(len(means))
    assert result.stderr == pytest.approx(expected, rel=1e-5)


def test_the_last_window_is_shorter(make_model, ids):
    model = make_model("llama")
    assert [perplexity(model, ids[:n], 20).tokens for n in (40, 41, 42, 59)] == [38, 38, 39, 56]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_num_windows_takes_the_first(make_model, ids, count):
    model = make_model("llama")
    result = perplexity(model, ids, 20, num_windows=count)
    assert result.windows == count
    assert result.value == perplexity(model, ids[: 20 * count], 20).value


@pytest.mark.parametrize("count", [0, -1, 6])
def test_windows_that_the_text_does_not_hold(make_model, ids, count):
    with pytest.raises(TextError, match=f"{count} windows were asked for; the text holds 5"):
        perplexity(make_model("llama"), ids, 20, num_windows=count)


@pytest.mark.parametrize(
    ("length", "message"), [(104, "has 103 tokens, fewer than one window of 104"), (1, "at least")]
)
def test_lengths_that_do_not_work(make_model, ids, length, message):
    with pytest.raises(TextError, match=message):
        perplexity(make_model("llama"), ids, length)


@pytest.mark.parametrize("bad", [96, -1, 10_000])
def test_a_token_outside_the_vocabulary(make_model, ids, bad):
    ids[7] = bad
    with pytest.raises(TextError, match=f"token id {bad} is outside"):
        perplexity(make_model("llama"), ids, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises(make_model, ids, bad):
    model = make_model("llama")
    token = int(ids[45])  # in the third window, of those of 20
    others = torch.cat([ids[:40], ids[60:]])
    ids = torch.where(ids == token, 5, ids)
    ids[45] = token
    assert len(others)
    model.model.embed_tokens.weight.data[token] = bad
    with pytest.raises(NumericalError, match=r"the loss of window 2 is"):
        perplexity(model, ids, 20)


class Fixed(nn.Module):
    """Gives the same logits everywhere, in a dtype of its own."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.embedding = nn.Embedding(len(logits), 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_bfloat16_logits_are_summed_in_float32():
    """A thousand tokens of loss 4.1589: in bfloat16 the sum would stall at 1024 or so."""
    logits = torch.linspace(-1, 1, 64).bfloat16()
    ids = torch.arange(1024) % 64
    result = perplexity(Fixed(logits), ids, 1024)
    expected = float(-logits.double().log_softmax(-1)[ids[1:]].mean())
    assert result.mean_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision(make_model, ids, dtype):
    exact = perplexity(make_model("llama"), ids, 25)
    half = make_model("llama", dtype=dtype)
    result = perplexity(half, ids, 25)
    expected = torch.cat(losses_of(half, ids.split(25))).mean()
    assert result.mean_loss == pytest.approx(float(expected), rel=1e-6)
    assert result.value == pytest.approx(exact.value, rel=0.03)


def test_the_mode_of_the_model_is_kept(make_model, ids):
    model = make_model("llama", attention_dropout=0.5)
    expected = perplexity(model, ids, 20)
    model.train()
    assert perplexity(model, ids, 20).value == expected.value
    assert model.training
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError):
        perplexity(model, ids, 20)
    assert model.training


def test_progress_sees_every_window(make_model, ids):
    seen = []

    def track(windows, total):
        for window in windows:
            seen.append((len(window), total))
            yield window

    measure(make_model("llama"), ids, 40, track=track)
    assert seen == [(40, 3), (40, 3), (23, 3)]


def test_a_compressed_model(make_compressed, make_model, ids):
    model, _ = make_compressed("llama", keep=0.9)
    compressed, dense = perplexity(model, ids, 25), perplexity(make_model("llama"), ids, 25)
    assert compressed.data_fingerprint == dense.data_fingerprint
    assert compressed.value != dense.value


def test_the_result_reads_back(make_model, ids):
    result = perplexity(make_model("llama"), ids, 20)
    assert EvalResult.model_validate_json(result.model_dump_json()) == result


def test_nothing_of_the_model_changes(make_model, ids):
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perplexity(model, ids, 20)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lengths", [(10, 10), (7, 30, 2), (24,)])
def test_given_windows(make_model, ids, lengths):
    model = make_model("llama")
    windows = TokenWindows(tuple(ids[: sum(lengths)].split(list(lengths))))
    every = torch.cat(losses_of(model, windows.windows))
    result = windows_perplexity(model, windows)
    assert result.value == pytest.approx(math.exp(float(every.mean())), rel=1e-6)
    assert (result.tokens, result.windows) == (sum(lengths) - len(lengths), len(lengths))
    assert result.data_fingerprint == windows.fingerprint()


def test_given_windows_that_cannot_be_scored(make_model):
    model = make_model("llama")
    with pytest.raises(TextError, match="at least 2 tokens"):
        windows_perplexity(model, TokenWindows((torch.tensor([4, 5]), torch.tensor([4]))))
    with pytest.raises(TextError, match="token id 96 is outside"):
        windows_perplexity(model, TokenWindows((torch.tensor([4, 96]),)))


def test_given_windows_leave_the_mode(make_model):
    model = make_model("llama").train()
    windows_perplexity(model, TokenWindows((torch.tensor([4, 5, 6]),)))
    assert model.training
