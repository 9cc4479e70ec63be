"""Which linears make keys and values, found by running the model; and fused ones in parts."""

import copy
from itertools import chain
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from slimrank.errors import ModelError
from slimrank.linalg import decompose_outputs
from slimrank.model import find_attention, replace_linear, split_fused
from slimrank.nn import LowRankLinear, SplitLinear
from tiny.models import COMMON, FAMILIES, IDS, fill

NEW_DECODER = {"new_decoder_architecture": True, "num_kv_heads": 2}
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    "falcon_new": ("falcon", NEW_DECODER),
    "falcon_many": ("falcon", {"multi_query": False}),
    "falcon_alibi": ("falcon", {"alibi": True}),
}
NORMED = ("qwen3", "gemma3", "olmo2", "qwen3_moe")  # keys pass a norm before the cache


def span(*ranges: tuple[int, int]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(range(*each) for each in ranges))


LLAMA = ("model.layers.{}.self_attn", "k_proj", "v_proj", None, None, 16)
WIDE = (*LLAMA[:5], 32)
FALCON = ("transformer.h.{}.self_attention", "query_key_value", "query_key_value")
INTERLEAVED = (
    span((8, 16), (32, 40), (56, 64), (80, 88)),
    span((16, 24), (40, 48), (64, 72), (88, 96)),
    32,
)
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_tied": LLAMA,
    "qwen3": WIDE,
    "gemma2": WIDE,
    "gemma3": WIDE,
    "phi3": (LLAMA[0], "qkv_proj", "qkv_proj", span((32, 48)), span((48, 64)), 16),
    "opt": ("model.decoder.layers.{}.self_attn", "k_proj", "v_proj", None, None, 32),
    "gpt_neox": (
        "gpt_neox.layers.{}.attention",
        "query_key_value",
        "query_key_value",
        *INTERLEAVED,
    ),
    "olmo2": LLAMA,
    "falcon": (*FALCON, span((32, 40)), span((40, 48)), 8),
    "falcon_alibi": (*FALCON, span((32, 40)), span((40, 48)), 8),
    "falcon_new": (*FALCON, span((16, 24), (48, 56)), span((24, 32), (56, 64)), 16),
    "falcon_many": (*FALCON, *INTERLEAVED),
    "mixtral": LLAMA,
    "qwen3_moe": WIDE,
}
FUSED_CASES = tuple(case for case, expected in EXPECTED.items() if expected[3] is not None)


@pytest.fixture
def made(make_model):
    def make(case: str, **kwargs: Any) -> Any:
        family, overrides = CASES[case]
        return make_model(family, **overrides, **kwargs)

    return make


@pytest.fixture
def ids(make_windows) -> torch.Tensor:
    return torch.stack(make_windows(count=2, length=8).windows)


def described(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (site.name, site.keys, site.values, site.key_rows, site.value_rows)
        for site in find_attention(model)
    ]


@torch.no_grad()
def cached(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in the cache of the first layer, as (batch, tokens, heads, features)."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    return layer.keys.transpose(1, 2), layer.values.transpose(1, 2)


@pytest.mark.parametrize("case", EXPECTED)
def test_linears_and_rows_of_each_family(case, made):
    name, keys, values, key_rows, value_rows, features = EXPECTED[case]
    found = find_attention(made(case))
    assert len(found) == 2
    for block, site in enumerate(found):
        assert site.name == name.format(block)
        assert (site.block, site.layer) == (block, block)
        assert site.keys == f"{site.name}.{keys}"
        assert site.values == f"{site.name}.{values}"
        assert (site.key_rows, site.value_rows) == (key_rows, value_rows)
        assert (site.key_features, site.value_features) == (features, features)


@pytest.mark.parametrize("case", EXPECTED)
def test_meta_device_and_other_dtypes_give_the_same(case, made, make_skeleton):
    expected = find_attention(made(case))
    family, overrides = CASES[case]
    assert find_attention(make_skeleton(family, **overrides)) == expected
    assert find_attention(made(case, dtype=torch.bfloat16)) == expected


@pytest.mark.parametrize("case", EXPECTED)
def test_the_cache_holds_just_these_outputs_in_this_order(case, made, ids):
    model = made(case)
    site = find_attention(model)[0]
    outputs: dict[str, torch.Tensor] = {}
    for name in {site.keys, site.values}:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: outputs.__setitem__(name, output)
        )
    keys, values = cached(model, ids)
    copies = 2 if case == "falcon_new" else 1
    rows = slice(None) if site.value_rows is None else list(site.value_rows)
    assert torch.equal(values[:, :, ::copies].flatten(2), outputs[site.values][..., rows])
    if case not in NORMED:  # the first token is not rotated
        rows = slice(None) if site.key_rows is None else list(site.key_rows)
        first = outputs[site.keys][:, 0, rows]
        assert torch.equal(keys[:, 0, ::copies].flatten(1), first)


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("part", ["keys", "values", "rest"])
def test_changed_rows_change_their_part_only(case, part, made, ids):
    model = made(case)
    site = find_attention(model)[0]
    keys, values = cached(model, ids)
    if part == "rest" and site.key_rows is None:
        linear = model.get_submodule(site.keys.replace("k_proj", "q_proj"))
        rows = list(range(linear.out_features))
    elif part == "rest":
        linear = model.get_submodule(site.keys)
        both = {*site.key_rows, *site.value_rows}
        rows = [row for row in range(linear.out_features) if row not in both]
    else:
        linear = model.get_submodule(getattr(site, part))
        rows = {"keys": site.key_rows, "values": site.value_rows}[part]
        rows = list(range(linear.out_features)) if rows is None else list(rows)
    with torch.no_grad():
        linear.weight[rows] = linear.weight[rows].flip(0) + 1
    new_keys, new_values = cached(model, ids)
    # a product of another block size may round differently: rows themselves are left alone
    assert torch.allclose(new_keys, keys, atol=1e-5) == (part != "keys")
    assert torch.allclose(new_values, values, atol=1e-5) == (part != "values")
    if part != "rest":  # every cached feature moves
        moved = (new_keys - keys) if part == "keys" else (new_values - values)
        assert (moved.abs().amax((0, 1)) > 1e-4).all()


@pytest.mark.parametrize("case", FUSED_CASES)
def test_a_split_model_computes_the_same(case, made, ids):
    model = made(case).double()
    ids = ids.repeat(1, 3)
    kwargs = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, **kwargs)
    count = sum(p.numel() for p in model.parameters())
    sites = find_attention(model)
    split_fused(model, sites)
    for site in sites:
        parts = model.get_submodule(site.keys)
        assert type(parts) is SplitLinear
        assert parts.keys.out_features == site.key_features
        assert not parts.training
    assert sum(p.numel() for p in model.parameters()) == count
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-12, atol=1e-12)
        assert torch.equal(model.generate(ids, **kwargs), tokens)
    for old, new in zip(sites, find_attention(model), strict=True):
        assert (new.keys, new.values) == (f"{old.keys}.keys", f"{old.values}.values")
        assert (new.key_rows, new.value_rows) == (None, None)
        assert (new.name, new.block, new.layer) == (old.name, old.block, old.layer)
        assert (new.key_features, new.value_features) == (old.key_features, old.value_features)


@pytest.mark.parametrize("case", FUSED_CASES)
def test_a_skeleton_splits_alike(case, made, make_skeleton):
    family, overrides = CASES[case]
    model, skeleton = made(case), make_skeleton(family, **overrides)
    for each in (model, skeleton):
        split_fused(each, find_attention(each))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_separate_linears_are_not_split(made):
    model = made("llama")
    before = dict(model.named_modules())
    split_fused(model, find_attention(model))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("case", ["llama", "qwen3", "opt", "phi3"])
def test_factors_are_found_like_linears(case, made):
    model = made(case)
    expected = find_attention(model)
    for name in {expected[0].keys, expected[0].values}:
        linear = model.get_submodule(name)
        factors = decompose_outputs(linear.weight.detach()).truncate(4)
        replace_linear(model, name, LowRankLinear.from_factors(linear, factors))
    assert find_attention(model) == expected
    if case == "phi3":
        with pytest.raises(ModelError, match=r"0\.self_attn\.qkv_proj is a LowRankLinear; split"):
            split_fused(model, expected)


def own_forwards(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in module.__dict__]


def hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for m in model.modules()
        for hook in (*m._forward_pre_hooks, *m._forward_hooks, *m._forward_hooks_always_called)
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", EXPECTED)
def test_nothing_of_the_model_changes(case, device, made, make_skeleton):
    family, overrides = CASES[case]
    model = made(case) if device == "cpu" else make_skeleton(family, **overrides)
    before = {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modules, state = dict(model.named_modules()), torch.get_rng_state()
    find_attention(model)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[name] is t and t._version == version for name, (t, version) in before.items())
    assert dict(model.named_modules()) == modules
    assert not own_forwards(model)
    assert not hooks(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_have_gradients_off(context, made):
    expected = described(made("phi3"))
    model = made("phi3")
    with context():
        assert described(model) == expected


def test_the_caller_may_have_another_default_device_and_dtype(made):
    expected, model = described(made("gpt_neox")), made("gpt_neox")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert described(model) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_forward_set_by_hand_comes_back(made):
    model = made("llama")
    linear, norm = model.model.layers[0].self_attn.k_proj, model.model.layers[0].input_layernorm
    own = {module: module.forward for module in (linear, norm)}
    for module, forward in own.items():
        module.forward = forward
    find_attention(model)
    assert all(module.__dict__["forward"] is forward for module, forward in own.items())


def other_family(kind: str, **config: Any) -> Any:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**{**COMMON, **config}), dtype=torch.float32
        )
    fill(model)
    return model.eval()


def test_clipped_keys_do_not_hide_their_source():
    site = find_attention(other_family("OlmoConfig", clip_qkv=0.5))[1]
    assert (site.keys, site.key_features) == ("model.layers.1.self_attn.k_proj", 16)


def test_fused_and_clipped():
    config = {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}
    model = other_family("MptConfig", **config, attn_config={"clip_qkv": 0.25})
    site = find_attention(model)[1]
    assert (site.key_rows, site.value_rows) == (span((32, 64)), span((64, 96)))


def test_fused_projection_with_normalised_keys_is_refused():
    with pytest.raises(
        ModelError, match=r"0\.self_attn\.query_key_value: fused projection with normalised keys"
    ):
        find_attention(other_family("PersimmonConfig", num_key_value_heads=4))


def test_a_model_without_attention_is_refused():
    model = other_family("MambaConfig")
    with pytest.raises(ModelError, match=r"MambaForCausalLM (has no attention|takes no key/value)"):
        find_attention(model)


@pytest.mark.parametrize("skeleton", [False, True])
def test_two_modules_of_one_cache_layer_are_refused(skeleton, made, make_skeleton):
    model = make_skeleton("llama") if skeleton else made("llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn and .*layers\.1\.self_attn both write to layer 0"
    ):
        find_attention(model)


class Sum(nn.Module):
    """Keys of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.one(states) + self.two(states)


class Part(nn.Module):
    """Keys that are a part of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(32, 20)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.whole(states)[..., 2:18]


class Nothing(nn.Module):
    """Keys of no linear."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states[..., :16]


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (Sum, r"keys of .*0\.self_attn come from .*k_proj\.one and .*k_proj\.two; .*exactly one"),
        (Part, r"only a part of .*0\.self_attn\.k_proj\.whole makes keys"),
        (Nothing, r"keys of .*0\.self_attn come from no linear inside it"),
    ],
)
def test_keys_of_anything_but_one_whole_linear_are_refused(replacement, message, made):
    model = made("llama")
    model.model.layers[0].self_attn.k_proj = replacement()
    with pytest.raises(ModelError, match=message):
        find_attention(model)
    assert not own_forwards(model)
    assert not hooks(model)


def test_values_are_looked_at_too(made):
    model = made("llama")
    model.model.layers[1].self_attn.v_proj = Sum()
    with pytest.raises(ModelError, match=r"values of .*1\.self_attn come from"):
        find_attention(model)


class Slice(nn.Module):
    """A part of what the queries' linear gave last, times a scale."""

    def __init__(self, seen: list[torch.Tensor], start: int, scale: float = 1.0) -> None:
        super().__init__()
        self.seen, self.start, self.scale = seen, start, scale

    def forward(self, _states: torch.Tensor) -> torch.Tensor:
        return self.scale * self.seen[-1][..., self.start : self.start + 16]


def share(model: Any, scale: float = 1.0, starts: tuple[int, int] = (0, 16)) -> nn.Module:
    """Make the first attention take keys and values from the queries' linear."""
    attention = model.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    attention.q_proj.register_forward_hook(lambda _m, _a, output: seen.append(output))
    attention.k_proj, attention.v_proj = Slice(seen, starts[0], scale), Slice(seen, starts[1])
    return model


def test_rows_are_read_wherever_they_are_cut(made):
    site = find_attention(share(made("llama"), starts=(16, 0)))[0]
    assert site.keys == site.values == "model.layers.0.self_attn.q_proj"
    assert (site.key_rows, site.value_rows) == (span((16, 32)), span((0, 16)))


def test_keys_and_values_of_the_same_rows_are_refused(made):
    with pytest.raises(ModelError, match=r"values of .*0\.self_attn are the same outputs of .*q_"):
        find_attention(share(made("llama"), starts=(0, 0)))


def test_scaled_keys_of_a_fused_projection_are_not_mistaken_for_other_rows(made):
    with pytest.raises(ModelError, match=r"q_proj: fused projection with normalised keys"):
        find_attention(share(made("llama"), scale=2.0))


def test_a_linear_that_runs_twice_is_refused(made):
    model = made("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = attention.k_proj
    with pytest.raises(
        ModelError, match=r"0\.self_attn\.k_proj runs several times in .*0\.self_at"
    ):
        find_attention(model)


def test_an_attention_outside_the_blocks_is_refused(made):
    model = made("llama")
    model.more = copy.deepcopy(model.model.layers)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn writes .* no part of more"):
        find_attention(model, "more")


def test_a_skeleton_that_cannot_reach_an_attention_says_so(make_skeleton):
    model = make_skeleton("llama")
    model.model.layers[1].input_layernorm.register_forward_hook(
        lambda _m, _a, output: output * output.sum().item()
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be followed without its weights"):
        find_attention(model)
    assert not own_forwards(model)


def test_a_model_that_fails_fails_with_its_own_error(made):
    model = made("llama")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise ZeroDivisionError

    model.model.layers[1].mlp.act_fn.forward = fail
    with pytest.raises(ZeroDivisionError):
        find_attention(model)
    assert not hooks(model)
