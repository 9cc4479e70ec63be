"""What is timed is what ``generate`` does."""

import pytest
import torch

from slimrank.benchmarking import latency
from slimrank.benchmarking.latency import run_once
from slimrank.nn import cache_bytes


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "opt", "falcon", "gemma3"])
def test_each_step_adds_a_token_to_the_cache(make_model, family):
    model = make_model(family)
    caches, fed = [], []

    def watch(_module, _arguments, given, outputs):
        fed.append(tuple(given["input_ids"].shape))
        caches.append(outputs.past_key_values.get_seq_length())

    model.register_forward_hook(watch, with_kwargs=True)
    found = run_once(model, batch=3, context=7, new_tokens=4)
    assert fed == [(3, 7)] + [(3, 1)] * 4
    assert caches == [7, 8, 9, 10, 11]
    assert found.prefill_seconds > 0
    assert found.decode_seconds > 0


def test_the_tokens_are_those_of_generate(watched):
    model, seen = watched("llama")
    run_once(model, batch=2, context=6, new_tokens=5)
    prompt, *steps = list(seen)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(torch.cat(steps, -1), written[:, 6:])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma3"])
def test_a_fixed_cache_has_room_for_all_and_gives_the_same_tokens(watched, family):
    model, seen = watched(family)
    run_once(model, batch=2, context=6, new_tokens=5)
    growing = list(seen)
    seen.clear()
    found = run_once(model, batch=2, context=6, new_tokens=5, fixed_cache=True)
    assert all(torch.equal(*pair) for pair in zip(growing, seen, strict=True))
    outputs = model(input_ids=torch.zeros(2, 6 + 5, dtype=torch.long), use_cache=True)
    assert found.cache_bytes == cache_bytes(outputs.past_key_values)


def test_the_median_step_counts(make_model, monkeypatch):
    times = iter([0.0, 2.0, 10.0, 11.0, 20.0, 29.0, 30.0, 33.0])
    monkeypatch.setattr(latency, "_now", lambda _device: next(times))
    found = run_once(make_model("llama"), batch=1, context=4, new_tokens=3)
    assert found[:2] == (2.0, 3.0)


def test_the_cache_is_taken_behind_the_prefill(make_model):
    model = make_model("llama")
    outputs = model(input_ids=torch.zeros(2, 5, dtype=torch.long), use_cache=True)
    found = run_once(model, batch=2, context=5, new_tokens=3)
    assert found.cache_bytes == cache_bytes(outputs.past_key_values)
