"""The probe tells a graph that is right from one that is wrong in a mask, a position or a cache."""

import pytest
import torch
from transformers import DynamicCache

from slimrank.errors import ModelError
from slimrank.exporting.probe import MOST_APART, Probe


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def probe(model):
    with torch.no_grad():
        return Probe.of(model)


def make_step(model, change):
    """Run a model with a cache, on inputs that were changed."""
    cache = DynamicCache()

    @torch.no_grad()
    def step(inputs):
        return model(**change(dict(inputs)), past_key_values=cache).logits

    return step


def test_the_model_itself_is_as_near_as_can_be(model, probe):
    assert probe.require_near(make_step(model, lambda inputs: inputs), "it") == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])},
        lambda inputs: inputs | {"position_ids": inputs["position_ids"].flip(0)},
        lambda inputs: inputs | {"input_ids": inputs["input_ids"].flip(0)},
    ],
    ids=["mask", "positions", "tokens"],
)
def test_what_is_wrong_is_far(change, model, probe):
    assert probe.apart(make_step(model, change)) > 10 * MOST_APART
    with pytest.raises(ModelError, match="it runs, but its logits are"):
        probe.require_near(make_step(model, change), "it")


def test_a_cache_that_forgets_is_far(model, probe):
    @torch.no_grad()
    def step(inputs):
        return model(inputs["input_ids"]).logits

    assert probe.apart(step) > 10 * MOST_APART


def test_what_is_not_finite_is_refused(probe):
    def step(inputs):
        return torch.full((*inputs["input_ids"].shape, probe.logits.shape[-1]), torch.nan)

    with pytest.raises(ModelError, match="logits are nan"):
        probe.require_near(step, "it")
