"""A model with a cache of latents against itself without a cache."""

import copy
from concurrent.futures import ThreadPoolExecutor

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from slimrank.errors import ModelError
from slimrank.nn import (
    LowRankLinear,
    attach_latent_cache,
    cache_bytes,
    detach_latent_cache,
    latent_bytes,
)
from slimrank.nn.latent_layer import LatentLayer, LatentSlidingLayer
from slimrank.nn.latent_states import LatentStates

SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "olmo2")
FUSED = ("phi3", "gpt_neox", "falcon")
KINDS = [
    (family, attention, {})
    for family in SEPARATE + FUSED
    for attention in ("eager", "sdpa")
    if (family, attention) != ("gemma2", "sdpa")  # its scores are capped, which sdpa cannot do
] + [
    ("falcon", attention, {"alibi": alibi, "new_decoder_architecture": new, "num_kv_heads": 2})
    for attention in ("eager", "sdpa")
    for alibi, new in ((True, False), (False, True))
]
each_kind = pytest.mark.parametrize(("family", "attention", "more"), KINDS)
# attentions in eager mode take their softmax in float32, whatever the dtype; Falcon with ALiBi
# rounds its biases to bfloat16, the same in every call
LOGITS = {"eager": 1e-5, "sdpa": 1e-9}


def built(make_latent, family, attention="sdpa", **more):
    return make_latent(family, attn_implementation=attention, **more)


def is_latent(cache) -> bool:
    return all(type(layer) in (LatentLayer, LatentSlidingLayer) for layer in cache.layers)


def close(logits, expected, tolerance=1e-9) -> bool:
    return bool((logits - expected).abs().max() <= tolerance)


def left_padded(tokens, lengths):
    mask = torch.stack([torch.arange(tokens.shape[1]) >= tokens.shape[1] - n for n in lengths])
    return {"input_ids": tokens.where(mask, 0), "attention_mask": mask.long()}


@torch.no_grad()
def chunked(model, ids, *ends, cache=None):
    """Logits of tokens that come in chunks, and the cache they leave."""
    parts, start = [], 0
    for end in (*ends, ids.shape[1]):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


@torch.no_grad()
def uncached(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


@each_kind
def test_decoding_gives_the_logits_of_one_forward(make_latent, tokens, family, attention, more):
    model = built(make_latent, family, attention, **more)
    expected = uncached(model, tokens)
    # a prefill, three steps of one token, three tokens at once, a chunk, and steps again
    logits, cache = chunked(model, tokens, 7, 8, 9, 10, 13, 36, 37, 38, 39)
    assert is_latent(cache)
    assert close(logits, expected, LOGITS[attention])


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3", "opt"])
def test_the_full_rank_as_well(make_latent, make_model, tokens, family):
    model = built(make_latent, family, share=1.0)
    expected = uncached(make_model(family, dtype=torch.float64), tokens)
    logits, _ = chunked(model, tokens, 20, 21, 30)
    assert close(logits, expected)


@each_kind
def test_greedy_tokens_of_padded_prompts(make_latent, tokens, family, attention, more):
    # masks of transformers overflow the float32 softmax of eager attention in float64
    dtype = torch.float32 if attention == "eager" else torch.float64
    model = built(make_latent, family, attention, dtype=dtype, **more)
    inputs = left_padded(tokens[:, :20], (20, 9))
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert is_latent(out.past_key_values)
    for row, length in enumerate((20, 9)):
        alone = tokens[row : row + 1, 20 - length : 20]
        expected = model.generate(alone, **options, use_cache=False)[0]
        assert out.sequences[row, 20 - length :].tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt", "falcon"])
def test_beams(make_latent, tokens, family):
    model = built(make_latent, family)
    inputs = left_padded(tokens[:, :12], (12, 5))
    options = {"max_new_tokens": 14, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options, use_cache=False)
    assert model.generate(**inputs, **options).tolist() == expected.tolist()
    # one row of positions serves all beams
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:1, :11], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    again = model.generate(tokens[:1, :12], **options, past_key_values=cache)
    assert again.tolist() == model.generate(tokens[:1, :12], **options, use_cache=False).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "phi3", "opt"])
def test_decoding_expands_nothing(make_latent, tokens, monkeypatch, family):
    def refuse(_):
        raise AssertionError("expanded")

    for attention in ("eager", "sdpa"):
        model = built(make_latent, family, attention)
        _, cache = chunked(model, tokens[:, :20])
        monkeypatch.setattr(LatentStates, "dense", refuse)
        chunked(model, tokens[:, 20:], 1, 2, 3, 6, 9, 12, 15, 18, cache=cache)
        monkeypatch.undo()


@pytest.mark.parametrize("tile", [1, 5])
def test_tiles_of_any_size(make_latent, tokens, monkeypatch, tile):
    monkeypatch.setattr("slimrank.nn.latent_states.TILE", tile)
    for family in ("llama", "mistral", "opt"):
        model = built(make_latent, family)
        logits, _ = chunked(model, tokens, 7, 8, 9, 30, 31)
        assert close(logits, uncached(model, tokens))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt_neox"])
def test_right_padding_with_explicit_masks(make_latent, tokens, family):
    model = built(make_latent, family)
    ids, mask = tokens[:, :20], torch.ones(2, 20, dtype=torch.long)
    mask[1, 7:12] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = uncached(model, ids, attention_mask=mask, position_ids=places)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, end in ((0, 12), *((step, step + 1) for step in range(12, 20))):
            logits = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                past_key_values=cache,
            ).logits
            seen = mask[:, start:end].bool()
            assert close(logits[seen], expected[:, start:end][seen])
    assert is_latent(cache)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_neox"])
def test_generate_prefills_in_chunks_and_goes_on_in_a_second_turn(make_latent, tokens, family):
    model = built(make_latent, family)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    first = model.generate(tokens[:, :20], **options, use_cache=False)
    prefilled = model.generate(tokens[:, :20], **options, prefill_chunk_size=6)
    assert prefilled.tolist() == first.tolist()
    cache = DynamicCache(config=model.config)
    assert model.generate(tokens[:, :20], **options, past_key_values=cache).tolist() == (
        first.tolist()
    )
    longer = torch.cat([first, tokens[:, 20:26]], 1)
    second = model.generate(longer, **options, past_key_values=cache)
    assert is_latent(cache)
    assert second.tolist() == model.generate(longer, **options, use_cache=False).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_generation_crops(make_latent, make_model, tokens, family):
    model, assistant = built(make_latent, family), make_model(family, dtype=torch.float64)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens[:1, :12], **options, use_cache=False)
    out = model.generate(tokens[:1, :12], **options, assistant_model=assistant)
    assert out.tolist() == expected.tolist()
    # a cache of latents in the assistant
    out = model.generate(tokens[:1, :12], **options, assistant_model=copy.deepcopy(model))
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_cropped_and_reset_caches(make_latent, tokens, family):
    model = built(make_latent, family)
    expected = uncached(model, tokens)
    _, cache = chunked(model, tokens[:, :7])
    cache.activate_past_recording()
    for end, back in ((12, 3), (25, 5)):
        at = cache.get_seq_length()
        chunked(model, tokens[:, at:end], cache=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == end - back
    logits, _ = chunked(model, tokens[:, 20:], 1, 2, cache=cache)
    assert close(logits, expected[:, 20:])
    cache.reset()
    assert cache_bytes(cache) == 0
    logits, _ = chunked(model, tokens, 10, 11, cache=cache)
    assert close(logits, expected)


def test_rows_repeated_and_selected(make_latent, tokens):
    model = built(make_latent, "llama")
    expected = uncached(model, tokens)
    for rows in (slice(0, 1), slice(0, 2)):
        _, cache = chunked(model, tokens[rows, :9])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 0]))
        order = [0, 0]
        logits, _ = chunked(model, tokens[order, 9:], 1, 2, cache=cache)
        assert close(logits, expected[order, 9:])


def test_positions_of_one_row_then_of_many(make_latent, tokens):
    model = built(make_latent, "llama")
    expected = uncached(model, tokens)
    rows = torch.arange(40).expand(2, -1)
    for wide in ((False, True, False), (True, False, True)):
        cache = DynamicCache()
        for part, is_wide in zip((slice(0, 9), slice(9, 10), slice(10, 40)), wide, strict=True):
            places = rows[:, part] if is_wide else rows[:1, part]
            with torch.no_grad():
                out = model(tokens[:, part], position_ids=places, past_key_values=cache)
            assert close(out.logits, expected[:, part])


def test_copies_of_a_cache_go_their_own_ways(make_latent, tokens):
    model = built(make_latent, "mistral")
    expected = uncached(model, tokens)
    _, cache = chunked(model, tokens[:, :20])
    twin = copy.deepcopy(cache)
    chunked(model, tokens.flip(0)[:, 20:], 1, cache=cache)
    logits, _ = chunked(model, tokens[:, 20:], 1, 2, cache=twin)
    assert close(logits, expected[:, 20:])


def test_a_copy_of_a_model_has_a_cache_of_its_own(make_latent, tokens):
    model = built(make_latent, "llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.expand.weight.mul_(2)
    for one in (model, twin):
        logits, cache = chunked(one, tokens, 10, 11, 12)
        assert is_latent(cache)
        assert close(logits, uncached(one, tokens))
    assert not close(uncached(model, tokens), uncached(twin, tokens))
    detach_latent_cache(twin)
    assert not is_latent(chunked(twin, tokens, 10)[1])
    assert is_latent(chunked(model, tokens, 10)[1])


def test_nothing_is_added_to_the_state(make_latent, make_model):
    model = built(make_latent, "llama")
    names, modules = list(model.state_dict()), list(model.named_modules())
    detach_latent_cache(model)
    assert names == list(model.state_dict())
    assert modules == list(model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(getattr(m, "on_latent", None) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_other_caches_stay_what_they_are(make_latent, tokens, family):
    model = built(make_latent, family)
    expected = uncached(model, tokens)
    static = StaticCache(config=model.config, max_cache_len=40)
    filled = DynamicCache(config=model.config)
    detach_latent_cache(model)
    names = {
        f"model.layers.{i}.self_attn": tuple(
            f"model.layers.{i}.self_attn.{part}" for part in ("k_proj", "v_proj")
        )
        for i in range(2)
    }
    chunked(model, tokens[:, :10], cache=filled)
    attach_latent_cache(model, names)
    logits, cache = chunked(model, tokens[:, 10:], 1, 2, cache=filled)
    assert close(logits, expected[:, 10:])
    assert not is_latent(cache)
    logits, _ = chunked(model, tokens, 10, 11, cache=static)
    assert close(logits, expected)
    # who makes a kind of cache of their own means it
    logits, cache = chunked(model, tokens, 10, 11, cache=type("Mine", (DynamicCache,), {})())
    assert close(logits, expected)
    assert not is_latent(cache)


def test_an_offloaded_cache_is_not_touched(make_latent):
    model = built(make_latent, "llama")
    offloaded = DynamicCache.__new__(DynamicCache)  # its constructor wants an accelerator
    offloaded.__dict__.update(DynamicCache(config=model.config).__dict__, offloading=True)
    model._slimrank_latent_cache._convert(offloaded)
    assert not is_latent(offloaded)


def test_windows_are_as_the_caller_asked(make_latent, tokens):
    model = built(make_latent, "mistral")
    _, cache = chunked(model, tokens, 20)
    assert {type(layer) for layer in cache.layers} == {LatentSlidingLayer}
    logits, cache = chunked(model, tokens, 20, 21, cache=DynamicCache())
    assert {type(layer) for layer in cache.layers} == {LatentLayer}
    assert close(logits, uncached(model, tokens))
    cache.crop(-18)  # what a sliding cache could not do
    again, _ = chunked(model, tokens[:, 22:], 1, cache=cache)
    assert close(again, logits[:, 22:])


def test_no_cache_where_none_is_asked_for(make_latent, tokens):
    model = built(make_latent, "llama")
    with torch.no_grad():
        assert model(tokens, use_cache=False).past_key_values is None
        assert is_latent(model(tokens).past_key_values)
        assert is_latent(model.model(tokens).past_key_values)
        assert is_latent(model.model(tokens, None, None, None).past_key_values)
        model.config.use_cache = False
        assert model(tokens).past_key_values is None
    model.train()
    cache = model(tokens, use_cache=True).past_key_values
    assert not is_latent(cache)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt", "gpt_neox", "falcon"])
def test_half_precision(make_latent, tokens, family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("capped scores")
    model = built(make_latent, family, attention, dtype=torch.bfloat16)
    exact = uncached(copy.deepcopy(model).double(), tokens)
    logits, cache = chunked(model, tokens, 9, 10, 11, 14, 39)
    assert is_latent(cache)
    # no further from the truth than the model is without a cache, but for luck
    error = (logits.double() - exact).norm()
    assert error <= 2 * (uncached(model, tokens).double() - exact).norm()


def test_gradients_pass_through_latents(make_latent, tokens):
    model = built(make_latent, "llama")
    weights = [model.model.layers[0].self_attn.k_proj.latent.weight]
    weights.append(model.model.layers[1].self_attn.v_proj.expand.weight)
    whole = torch.autograd.grad(model(tokens, use_cache=False).logits[:, -1].sum(), weights)
    cache = model(tokens[:, :39]).past_key_values
    last = model(tokens[:, 39:], past_key_values=cache).logits.sum()
    for got, expected in zip(torch.autograd.grad(last, weights), whole, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_inference_mode(make_latent, tokens):
    model = built(make_latent, "llama")
    expected = uncached(model, tokens)
    with torch.inference_mode():
        cache = model(tokens[:, :39]).past_key_values
        logits = model(tokens[:, 39:], past_key_values=cache).logits
    assert close(logits[:, 0].clone(), expected[:, -1])


def test_threads_do_not_hear_each_other(make_latent, tokens):
    model = built(make_latent, "llama")
    expected = uncached(model, tokens)
    others = []

    def interrupt(*_):
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            others.append(pool.submit(chunked, model, tokens.flip(0), 10, 11).result()[0])

    handle = model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(interrupt)
    logits, _ = chunked(model, tokens, 10, 11)
    assert close(logits, expected)
    assert close(others[0], expected.flip(0))


@pytest.mark.parametrize("compressed", [True, False])
def test_the_cache_of_another_model_is_refused(make_latent, make_model, tokens, compressed):
    model = built(make_latent, "llama")
    other = built(make_latent, "llama") if compressed else make_model("llama", dtype=torch.float64)
    _, cache = chunked(model, tokens[:, :9])
    with pytest.raises(ModelError, match="latents of another model"):
        chunked(other, tokens[:, 9:], cache=cache)
    cache.reset()
    with pytest.raises(ModelError, match="latents of another model"):
        chunked(other, tokens, cache=cache)
    logits, _ = chunked(model, tokens, 9, cache=cache)
    assert close(logits, uncached(model, tokens))


def test_a_detached_model_refuses_its_old_cache(make_latent, tokens):
    model = built(make_latent, "llama")
    _, cache = chunked(model, tokens[:, :9])
    detach_latent_cache(model)
    detach_latent_cache(model)
    with pytest.raises(ModelError, match="attached again or detached"):
        chunked(model, tokens[:, 9:], cache=cache)


def test_an_error_inside_an_attention_leaves_nothing_behind(make_latent, tokens):
    model = built(make_latent, "llama")
    block = model.model.layers[1].self_attn
    handle = block.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chunked(model, tokens)
    handle.remove()
    tap = model._slimrank_latent_cache._taps[1]
    assert tap.take() is None
    assert close(chunked(model, tokens, 9, 10)[0], uncached(model, tokens))


def test_an_architecture_that_cannot_be_followed_is_refused_by_name(make_latent, tokens):
    model = built(make_latent, "llama")
    name = "model.layers.1.self_attn"
    odd = model.get_submodule(name).__class__

    class Odd(odd):
        def forward(self, hidden_states, position_ids=None, **kwargs):
            shift = position_ids[..., None].to(hidden_states.dtype)
            keys, self.k_proj.bias = self.k_proj.bias, None
            try:
                self.k_proj.bias = nn.Parameter(shift.mean().expand(self.k_proj.out_features))
                return super().forward(hidden_states, position_ids=position_ids, **kwargs)
            finally:
                self.k_proj.bias = keys

    model.get_submodule(name).__class__ = Odd
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.self_attn: its keys cannot be made again"
    ):
        chunked(model, tokens)


def test_names_that_cannot_be_attached(make_model):
    model = make_model("llama")
    name = "model.layers.0.self_attn"
    k_proj, v_proj = f"{name}.k_proj", f"{name}.v_proj"
    with pytest.raises(ModelError, match=r"k_proj is a Linear, no LowRankLinear"):
        attach_latent_cache(model, {name: (k_proj, v_proj)})
    with pytest.raises(ModelError, match=r"no module .model\.h\.0."):
        attach_latent_cache(model, {"model.h.0": (k_proj, v_proj)})
    for part in (k_proj, v_proj):
        model.set_submodule(part, LowRankLinear(32, 16, rank=4, bias=False))
    with pytest.raises(ModelError, match="has layer_idx None"):
        attach_latent_cache(model, {"model.layers.0": (k_proj, v_proj)})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_are_not_named_keep_their_keys(make_model, tokens):
    model = make_model("llama", dtype=torch.float64)
    name = "model.layers.1.self_attn"
    for part in ("k_proj", "v_proj"):
        low = LowRankLinear(32, 16, rank=4, bias=False, dtype=torch.float64)
        model.set_submodule(f"{name}.{part}", low)
    attach_latent_cache(model, {name: (f"{name}.k_proj", f"{name}.v_proj")})
    for cache in (None, DynamicCache()):
        logits, cache = chunked(model, tokens, 9, 10, cache=cache)
        assert [isinstance(layer, LatentLayer) for layer in cache.layers] == [False, True]
        assert close(logits, uncached(model, tokens))


def test_bytes_are_those_foretold(make_latent, make_model, tokens):
    model = built(make_latent, "llama", share=0.5)
    linears = [(layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in model.model.layers]
    ranks = [(keys.rank, values.rank) for keys, values in linears]
    _, cache = chunked(model, tokens, 9, 10)
    assert cache_bytes(cache) == latent_bytes(ranks, 40, 2, 8, rotary=8, position_rows=1)
    out = model.generate(tokens, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True)
    assert cache_bytes(out.past_key_values) == latent_bytes(ranks, 45, 2, 8, rotary=8)
    sliding = built(make_latent, "gemma3", share=0.5)
    ranks = [
        (layer.self_attn.k_proj.rank, layer.self_attn.v_proj.rank) for layer in sliding.model.layers
    ]
    _, cache = chunked(sliding, tokens, 20, 21)
    expected = sum(
        latent_bytes([pair], kept, 2, 8, rotary=16, position_rows=1)
        for pair, kept in zip(ranks, (15, 40), strict=True)
    )
    assert cache_bytes(cache) == expected
    _, dense = chunked(make_model("llama", dtype=torch.float64), tokens)
    assert cache_bytes(dense) == 2 * 40 * 2 * 32 * 8


def test_weights_that_are_moved_in_for_each_forward(make_latent, tokens):
    model = built(make_latent, "llama")
    expected = uncached(model, tokens)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.k_proj.expand.weight.is_meta
    logits, cache = chunked(model, tokens, 9, 10, 13, 30)
    assert is_latent(cache)
    assert close(logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_on_the_factors(make_latent, tokens):
    model = built(make_latent, "qwen2")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "latent", "expand"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        adapted = peft.get_peft_model(model, config).double().eval()
    logits, cache = chunked(adapted, tokens, 9, 10, 13, 30)
    assert is_latent(cache)
    assert close(logits, uncached(adapted, tokens))
    with adapted.disable_adapter():
        assert not close(logits, uncached(adapted, tokens))


def test_other_caches_pass_the_hooks_untouched(make_latent, tokens, monkeypatch):
    # what stands there cannot be traced: a graph compiled with a static cache must not meet it
    model = built(make_latent, "llama")
    monkeypatch.setattr("slimrank.nn.latent_tap.threading", None)
    static = StaticCache(config=model.config, max_cache_len=40)
    logits, _ = chunked(model, tokens, 20, 21, cache=static)
    assert close(logits, uncached(model, tokens))
    with pytest.raises(AttributeError, match="get_ident"):
        chunked(model, tokens)
