"""Sequences that a model writes itself."""

import copy

import pytest
import torch
from torch import nn

from slimrank import TokenWindows
from slimrank.calibration import generate_windows
from slimrank.errors import ModelError


def with_predictions(model, probabilities):
    """A copy that predicts the same everywhere."""
    model = copy.deepcopy(model)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight.data.zero_()
    head.bias.data.fill_(-torch.inf)
    for token, share in probabilities.items():
        head.bias.data[token] = torch.tensor(share).log()
    model.lm_head = head
    return model


def test_every_family_goes_on_from_its_text(family, make_model, windows):
    written = generate_windows(make_model(family), windows, 5, seed=0)
    pieces = {tuple(p.tolist()) for w in windows.windows for p in w.unfold(0, 12, 1)}
    assert [tuple(window.shape) for window in written.windows] == [(24,)] * 5
    assert all(tuple(window[:12].tolist()) in pieces for window in written.windows)
    again = generate_windows(make_model(family), windows, 5, seed=0)
    assert written.fingerprint() == again.fingerprint()


def test_a_seed_decides_and_the_global_generator_is_left_alone(make_model, windows):
    model, state = make_model("llama"), torch.get_rng_state()
    written = [generate_windows(model, windows, 4, seed).fingerprint() for seed in (0, 1)]
    assert written[0] != written[1]
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_drawn_from_the_whole_distribution(make_model, make_windows):
    shares = {5: 0.6, 6: 0.3, 7: 0.1}
    model = with_predictions(make_model("llama"), shares)
    text = make_windows(8, 64)
    written = generate_windows(model, text, 64, seed=0)
    tokens = torch.cat([window[16:] for window in written.windows])
    for token, share in shares.items():
        spread = (share * (1 - share) / len(tokens)) ** 0.5
        assert float((tokens == token).double().mean()) == pytest.approx(share, abs=4 * spread)
    # One draw does not lead to the next: pairs are as frequent as their product says.
    pairs = torch.stack([window[16:].unfold(0, 2, 1) for window in written.windows]).flatten(0, 1)
    both = float(((pairs == 5).all(dim=1)).double().mean())
    assert both == pytest.approx(0.36, abs=4 * (0.36 * 0.64 / len(pairs)) ** 0.5)


def test_a_models_own_settings_change_nothing(make_model, make_windows):
    model = with_predictions(make_model("llama"), {5: 0.5, 6: 0.5})
    plain = generate_windows(model, make_windows(4, 40), 6, seed=0)
    settings = model.generation_config
    settings.repetition_penalty, settings.temperature, settings.top_k = 9.0, 0.1, 1
    settings.max_length, settings.do_sample = 20, True
    assert generate_windows(model, make_windows(4, 40), 6, seed=0).fingerprint() == (
        plain.fingerprint()
    )


def test_no_sequence_ends_early(make_model, make_windows):
    model = with_predictions(make_model("llama"), {2: 0.9, 5: 0.1})
    model.generation_config.eos_token_id = 2
    written = generate_windows(model, make_windows(4, 40), 6, seed=0)
    assert all(len(window) == 40 for window in written.windows)
    assert not any((window[16:] == 2).any() for window in written.windows)


def test_windows_of_unequal_length(make_model):
    text = TokenWindows((torch.arange(4, 12), torch.arange(4, 7), torch.arange(4, 24)))
    written = generate_windows(make_model("llama"), text, 7, seed=0, batch_size=1)
    assert [len(window) for window in written.windows] == [20] * 7


def test_windows_of_one_token(make_model):
    text = TokenWindows((torch.tensor([5]), torch.tensor([6])))
    written = generate_windows(make_model("llama"), text, 3, seed=0)
    assert all(window.tolist() in ([5], [6]) for window in written.windows)


def test_a_model_that_predicts_nan_is_refused(make_model, windows):
    model = make_model("llama")
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ModelError, match="a prediction after 12 tokens is NaN"):
        generate_windows(model, windows, 2, seed=0)


def test_a_model_that_cannot_says_so(make_model, windows, monkeypatch):
    model = make_model("llama")

    def generate(*_args, **_kwargs):
        raise NotImplementedError("no cache")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot write sequences .*no cache.*"):
        generate_windows(model, windows, 2, seed=0)
