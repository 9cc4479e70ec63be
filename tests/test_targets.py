"""What a recipe means on a model, and that looking changes nothing."""

import pytest
import torch
from torch import nn

import slimrank
from slimrank.errors import BudgetError
from slimrank.nn import SplitLinear
from slimrank.targets import find_work, probe_ids


def modules_of(model):
    return {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_error_leaves_the_model_as_it_was(make_model, make_recipe, windows, family):
    model = make_model(family)
    before = modules_of(model)
    with pytest.raises(BudgetError, match=r"kv-keep 0\.01 leaves .* rank 0, below the smallest"):
        slimrank.compress(model, make_recipe(kv_cache={"keep": 0.01}), windows=windows)
    assert modules_of(model) == before


def test_a_plan_leaves_the_model_as_it_was(make_model, make_recipe):
    model = make_model("phi3")
    before = modules_of(model)
    report = slimrank.plan(model, make_recipe(kv_cache={"keep": 0.5}))
    assert modules_of(model) == before
    assert any(x.name.endswith("qkv_proj.keys") for x in report.linears)
    with pytest.raises(BudgetError):
        slimrank.plan(model, make_recipe(keep=0.01, kv_cache={"keep": 0.5}))
    assert modules_of(model) == before


def test_keys_and_values_are_targets_only_of_a_cache_of_latents(make_model, make_recipe):
    recipe = make_recipe(targets=["up_proj"])
    for options, expected in (
        ({}, {"up_proj"}),
        ({"split_alike": True}, {"up_proj"}),
        ({"for_kv_cache": True}, {"up_proj", "k_proj", "v_proj"}),
    ):
        work = find_work(make_model("llama"), recipe, **options)
        assert {name.rsplit(".", 1)[1] for name in work.names} == expected
        assert len(work.attentions) == (2 if "for_kv_cache" in options else 0)
    work = find_work(make_model("llama"), make_recipe(targets=["k_proj"]), split_alike=True)
    assert {name.rsplit(".", 1)[1] for name in work.names} == {"k_proj"}


@pytest.mark.parametrize(("target", "kind"), [("qkv_proj", SplitLinear), ("o_proj", nn.Linear)])
def test_only_targeted_projections_are_split_alike(make_model, make_recipe, target, kind):
    model = make_model("phi3")
    work = find_work(model, make_recipe(targets=[target]), split_alike=True)
    assert all(type(block.self_attn.qkv_proj) is kind for block in model.model.layers)
    parts = {name.split("self_attn.")[1] for name in work.names}
    split = {f"qkv_proj.{part}" for part in ("rest", "keys", "values")}
    assert parts == (split if target == "qkv_proj" else {"o_proj"})


def test_a_split_model_computes_the_same_and_is_put_back(make_model, make_recipe, probe):
    model = make_model("phi3")
    before = modules_of(model)
    with torch.no_grad():
        expected = model(input_ids=probe, use_cache=False).logits
        work = find_work(model, make_recipe(), for_kv_cache=True)
        with work.put_back_after(model):
            found = model(input_ids=probe, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert modules_of(model) == before


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 8), (0.3, 4), (1.0, 16)])
def test_ranks_of_a_cache_of_latents(make_model, make_recipe, keep, rank):
    work = find_work(make_model("llama"), make_recipe(kv_cache={"keep": keep}))
    assert set(work.fixed.values()) == {rank}
    assert len(work.fixed) == 4
    assert (work.kv_cache.dense_values, work.kv_cache.latent_values) == (64, 4 * rank)


def test_a_probe_is_of_tokens_that_the_model_knows(make_model):
    model = make_model("llama")
    known = model.get_input_embeddings().num_embeddings
    assert probe_ids(model, known + 2).tolist() == [[*range(known), 0, 1]]
