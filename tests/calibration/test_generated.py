"""Sequences that a model writes itself."""

import copy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from slimrank import TokenWindows
from slimrank.calibration import generate_windows
from slimrank.errors import ModelError
from tiny.models import VOCABULARY


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


SETTINGS = [
    {"repetition_penalty": 5.0},
    {"do_sample": True, "temperature": 0.1, "top_k": 1},
    {"max_length": 20},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(VOCABULARY // 2))},
    {"begin_suppress_tokens": list(range(VOCABULARY // 2))},
    {"bad_words_ids": [[token] for token in range(VOCABULARY // 2)]},
    {"sequence_bias": [[[7], 30.0]]},
    {"forced_eos_token_id": 2},
    {"watermarking_config": {"bias": 20.0}},
    {"guidance_scale": 3.0},
    {"stop_strings": ["a"]},
    {"num_beams": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"prompt_lookup_num_tokens": 2},
    {"return_dict_in_generate": True},
]


def given(model, settings):
    """A copy of a model with generation settings of its own, and no others."""
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(**settings)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_a_models_own_settings_change_nothing(settings, make_model, make_windows):
    plain, other = (given(make_model("llama"), values) for values in ({}, settings))
    own, before = other.generation_config, other.generation_config.to_dict()
    found, wanted = (generate_windows(m, make_windows(4, 40), 6, seed=0) for m in (other, plain))
    assert [w.tolist() for w in found.windows] == [w.tolist() for w in wanted.windows]
    assert other.generation_config is own
    assert own.to_dict() == before


def test_what_an_old_config_says_of_generation_changes_nothing(make_model, make_windows):
    model, text = make_model("llama"), make_windows(4, 40)
    plain = generate_windows(model, text, 6, seed=0)
    model.config.no_repeat_ngram_size, model.config.temperature = 1, 0.1
    assert generate_windows(model, text, 6, seed=0).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("ends", [2, [2, 9]])
def test_no_sequence_ends_early(ends, make_model, make_windows):
    model = with_predictions(make_model("llama"), {2: 0.9, 5: 0.1})
    model.generation_config.eos_token_id = ends
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
    model = given(make_model("llama"), {"temperature": 0.5})
    own = model.generation_config
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ModelError, match="a prediction after 12 tokens is NaN"):
        generate_windows(model, windows, 2, seed=0)
    assert model.generation_config is own
    assert own.temperature == 0.5


def test_a_model_without_the_method_says_so(make_model, windows):
    told = (
        "^LlamaModel cannot write sequences of its own \\(it has no method generate\\); leave "
        "--generate out$"
    )
    with pytest.raises(ModelError, match=told):
        generate_windows(make_model("llama").model, windows, 2, seed=0)


def test_a_model_that_cannot_says_so(make_model, windows, monkeypatch):
    model = make_model("llama")
    own = model.generation_config

    def generate(*_args, **_kwargs):
        raise NotImplementedError("no cache")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot write sequences .*no cache.*"):
        generate_windows(model, windows, 2, seed=0)
    assert model.generation_config is own
