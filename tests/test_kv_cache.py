"""The cache of latents from recipe to folder to tokens, for every family."""

import json
from fractions import Fraction

import pytest
import torch
from transformers import DynamicCache, StaticCache

import slimrank
from slimrank import CompressionRecipe, compress, plan, profile
from slimrank.calibration import hold_out
from slimrank.checkpoint import read_folder
from slimrank.errors import BudgetError, CheckpointError, SizeWarning
from slimrank.nn import LowRankLinear, SplitLinear, cache_bytes, detach_latent_cache, latent_bytes

pytestmark = pytest.mark.filterwarnings("ignore::slimrank.errors.CoverageWarning")

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SPLIT = ("phi3", "gpt_neox", "falcon")


def recipe(keep, kv_keep, **others):
    return CompressionRecipe.from_dict(
        {
            "effort": "fast",
            "layout": "plain",
            "budget": {"param_ratio": keep},
            "kv_cache": {"keep": kv_keep},
            **others,
        }
    )


@pytest.fixture
def ids(windows):
    return torch.stack(windows.windows[:2])[:, :10]


def test_a_folder_generates_with_latents_what_it_does_without_a_cache(
    family, make_model, windows, ids, tmp_path
):
    model = make_model(family)
    report = compress(model, recipe(0.7, 0.5), windows=windows, out=tmp_path / "out")
    again = slimrank.load(tmp_path / "out")
    tokens = again.generate(ids, max_new_tokens=16, **GREEDY)
    assert torch.equal(tokens, again.generate(ids, max_new_tokens=16, use_cache=False, **GREEDY))
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=16, **GREEDY))
    cache = again(ids, use_cache=True).past_key_values
    assert {type(layer).__name__ for layer in cache.layers} <= {"LatentLayer", "LatentSlidingLayer"}
    assert report.kv_cache.latent_values == sum(
        layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers
    )
    assert 2 * report.kv_cache.latent_values <= report.kv_cache.dense_values
    size = report.size
    assert size.target_params <= 0.7 * size.target_params_before
    assert size.weight_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert any(isinstance(m, SplitLinear) for m in again.modules()) == (family in SPLIT)


def test_alone_it_leaves_all_else_dense(family, make_model, windows):
    model = make_model(family)
    report = compress(model, recipe(1.0, 0.5), windows=windows)
    factorised = {x.name.rsplit(".", 1)[-1] for x in report.linears if x.rank is not None}
    assert factorised == ({"keys", "values"} if family in SPLIT else {"k_proj", "v_proj"})


@pytest.mark.filterwarnings("ignore::slimrank.errors.SizeWarning")
def test_at_full_rank_it_gives_the_dense_models_tokens(family, make_model, windows, ids):
    dense = make_model(family)
    model = make_model(family)
    compress(model, recipe(1.0, 1.0), windows=windows)
    expected = dense.generate(ids, max_new_tokens=16, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=16, **GREEDY), expected)


def test_the_plan_is_what_is_done(family, make_model, make_skeleton, windows):
    wanted = recipe(0.7, 0.4)
    report = compress(make_model(family), wanted, windows=windows)
    planned = plan(make_skeleton(family), wanted)
    assert {x.name: x.rank for x in planned.linears} == {x.name: x.rank for x in report.linears}
    assert planned.kv_cache == report.kv_cache
    assert planned.size == report.size


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_profile_serves_it(family, make_model, windows, ids, tmp_path):
    """Keys and values beyond break-even, and split projections, from a profile made for it."""
    wanted = recipe(0.9, 0.9)
    direct, built = make_model(family), make_model(family)
    calibration, _ = hold_out(windows, 8)
    profile(built, wanted, tmp_path / "profile", windows=windows)
    assert not any(isinstance(m, SplitLinear) for m in built.modules())
    compress(direct, wanted, windows=calibration)
    compress(built, wanted, profile=tmp_path / "profile")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_profile_made_without_it_is_refused_by_name(family, make_model, windows, tmp_path):
    model = make_model(family)
    profile(model, recipe(0.9, 0.9).model_copy(update={"kv_cache": None}), tmp_path / "profile",
            windows=windows)  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="--kv"):
        compress(model, recipe(0.9, 0.9), profile=tmp_path / "profile")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_dynamic_ranks_leave_keys_and_values_alone(family, make_model, windows):
    model = make_model(family)
    wanted = recipe(0.7, 0.5, allocation="swift", swift={"importance_weight": 0.3})
    report = compress(model, wanted, windows=windows)
    uniform = compress(make_model(family), recipe(0.7, 0.5), windows=windows)
    assert report.size.target_params == uniform.size.target_params
    for mine, even in zip(report.linears, uniform.linears, strict=True):
        if mine.name.endswith(("k_proj", "v_proj", "keys", "values")):
            assert mine.rank == even.rank


def test_it_counts_whatever_the_targets_are(make_model, windows):
    """Keys and values join targets that leave them out."""
    report = compress(make_model("llama"), recipe(0.8, 0.5, targets=["down_proj"]), windows=windows)
    roles = {x.name.rsplit(".", 1)[-1] for x in report.linears}
    assert roles == {"down_proj", "k_proj", "v_proj"}
    assert report.size.target_params <= 0.8 * report.size.target_params_before


@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_ranks_are_the_share_of_the_width(make_model, windows, share):
    model = make_model("llama")
    compress(model, recipe(0.8, share), windows=windows)
    for name in ("k_proj", "v_proj"):
        linear = model.get_submodule(f"model.layers.0.self_attn.{name}")
        assert linear.rank == int(Fraction(str(share)) * linear.out_features)


def test_larger_factors_than_matrices_are_said(make_model, windows):
    with pytest.warns(SizeWarning, match="more than their matrices"):
        report = compress(make_model("gpt_neox"), recipe(1.0, 0.9), windows=windows)
    assert report.size.target_params > report.size.target_params_before
    assert any("more than their matrices" in message for message in report.warnings)


def test_a_share_below_one_number_is_refused(make_model, windows):
    with pytest.raises(BudgetError, match=r"kv-keep 0\.01"):
        compress(make_model("llama"), recipe(0.8, 0.01), windows=windows)


def test_more_cache_than_budget_is_refused(make_model, windows):
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError):
        compress(model, recipe(0.05, 1.0), windows=windows)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_failed_run_puts_split_projections_back(make_model, windows):
    model = make_model("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight.fill_(1e30)
    before = list(dict(model.named_modules()))
    with pytest.raises(slimrank.SlimrankError):
        compress(model, recipe(0.7, 0.5), windows=windows)
    assert list(dict(model.named_modules())) == before


def test_the_configuration_says_what_is_cached(make_model, windows, tmp_path):
    compress(make_model("phi3"), recipe(1.0, 0.5), windows=windows, out=tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    name = "model.layers.0.self_attn"
    assert entry["kv_cache"][name] == {
        "keys": f"{name}.qkv_proj.keys",
        "values": f"{name}.qkv_proj.values",
    }
    assert entry["splits"][f"{name}.qkv_proj"] == {"keys": [[32, 48]], "values": [[48, 64]]}
    assert set(entry["linears"]) >= {f"{name}.qkv_proj.keys", f"{name}.qkv_proj.values"}
    assert read_folder(tmp_path / "out").report.kv_cache.latent_values == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": {"model.layers.0.self_attn.qkv_proj": {"keys": [[0, 99]], "values": [[1, 2]]}}},
         "splits"),
        ({"splits": {"model.layers.0.nothing": {"keys": [[0, 2]], "values": [[2, 4]]}}},
         "nothing"),
        ({"kv_cache": {"model.layers.0.self_attn": {"keys": "a", "values": "b"}}},
         "not factorised"),
        ({"kv_cache": {"model.layers.0.self_attn": {"keys": 1}}}, "kv_cache"),
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(make_model, windows, tmp_path, change, message):
    out = tmp_path / "out"
    compress(make_model("phi3"), recipe(1.0, 0.5), windows=windows, out=out)
    values = json.loads((out / "config.json").read_text())
    values["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(out)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_saved_again_it_is_the_same(family, make_model, windows, ids, tmp_path):
    compress(make_model(family), recipe(0.7, 0.5), windows=windows, out=tmp_path / "out")
    first = slimrank.load(tmp_path / "out")
    first.save_pretrained(tmp_path / "again")
    second = slimrank.load(tmp_path / "again")
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    tokens = first.generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(tokens, second.generate(ids, max_new_tokens=8, **GREEDY))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_dequantize_gives_an_ordinary_model(family, make_model, windows, ids):
    model = make_model(family)
    compress(model, recipe(0.7, 0.5), windows=windows)
    expected = model(ids, use_cache=False).logits
    model = model.dequantize()
    assert not any(isinstance(m, (LowRankLinear, SplitLinear)) for m in model.modules())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    layers = model(ids, use_cache=True).past_key_values.layers
    assert not any(type(layer).__name__.startswith("Latent") for layer in layers)


def test_the_same_folder_with_an_ordinary_cache(make_model, windows, ids):
    model = make_model("llama")
    compress(model, recipe(0.7, 0.5), windows=windows)
    tokens = model.generate(ids, max_new_tokens=8, **GREEDY)
    static = StaticCache(config=model.config, max_cache_len=32)
    again = model.generate(ids, past_key_values=static, max_new_tokens=8, **GREEDY)
    assert torch.equal(tokens, again)
    detach_latent_cache(model)
    cache = DynamicCache(config=model.config)
    plain = model.generate(ids, past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert torch.equal(tokens, plain)
    assert type(cache.layers[0]).__name__ == "DynamicLayer"


def test_bytes_are_the_formulas(make_model, windows, ids):
    model = make_model("llama")
    report = compress(model, recipe(1.0, 0.5), windows=windows)
    cache = model(ids, use_cache=True).past_key_values
    ranks = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    rotary = model.config.hidden_size // model.config.num_attention_heads
    foretold = latent_bytes(ranks, tokens=10, batch=2, itemsize=4, rotary=rotary, position_rows=1)
    assert cache_bytes(cache) == foretold
    latents = 10 * 2 * report.kv_cache.latent_values * report.kv_cache.value_bytes
    assert foretold - latents == 10 * 2 * rotary * 4
