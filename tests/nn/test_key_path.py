"""Keys rebuilt by a shadow against the keys that the attention itself caches."""

import pytest
import torch
from transformers import DynamicCache

from slimrank.nn import detach_latent_cache
from slimrank.nn.key_path import KeyPath, _shadow, _Zeros

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "opt",
    "olmo2",
    "phi3",
    "gpt_neox",
    "falcon",
]
NARROW = {"llama", "qwen2", "qwen3", "gemma2", "gemma3"}  # heads apart by width


class Recorder:
    """Notes one call of an attention: arguments, latents, keys."""

    def __init__(self, model, tokens):
        detach_latent_cache(model)
        names = [name for name, _ in model.named_modules() if name.endswith(("k_proj", ".keys"))]
        self.keys = model.get_submodule(names[1])
        attention = names[1].removesuffix(".k_proj").removesuffix(".keys")
        for fused in (".qkv_proj", ".query_key_value"):
            attention = attention.removesuffix(fused)
        self.attention = model.get_submodule(attention)
        self.keys.on_latent = lambda latents: setattr(self, "latents", latents)
        handle = self.attention.register_forward_pre_hook(self.note, with_kwargs=True)
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        handle.remove()
        self.states = cache.layers[1].keys

    def note(self, module, args, kwargs):
        self.arguments = dict(kwargs)
        if args:
            self.arguments["hidden_states"] = args[0]
        self.cache = next(n for n, v in kwargs.items() if isinstance(v, DynamicCache))

    def path(self, width):
        return KeyPath(
            self.attention, self.keys, self.arguments, "hidden_states", self.cache, width
        )

    def positions(self, part):
        pair = self.arguments.get("position_embeddings")
        return pair and (pair[0][:, part], pair[1][:, part])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_any_tokens_have_the_keys_that_were_cached(make_latent, tokens, family):
    call = Recorder(make_latent(family), tokens)
    for width in (None, call.states.shape[-1]) if family in NARROW else (None,):
        path = call.path(width)
        for part in (slice(0, 40), slice(7, 8), torch.tensor([30, 3, 17])):
            rebuilt = path.rebuild(call.latents[:, part], call.positions(part))
            assert torch.allclose(rebuilt, call.states[:, :, part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_zeros_of_one_head_do_not_fit_every_architecture(make_latent, tokens, family):
    call = Recorder(make_latent(family), tokens)
    one = slice(39, None)
    with pytest.raises(RuntimeError):
        call.path(call.states.shape[-1]).rebuild(call.latents[:, one], call.positions(one))


def test_the_attention_is_left_as_it_was(make_latent, tokens):
    call = Recorder(make_latent("phi3"), tokens)
    heard = []
    call.keys.on_latent = heard.append
    before = dict(call.attention.named_modules())
    call.path(None).rebuild(call.latents, call.positions(slice(None)))
    assert heard == []
    assert dict(call.attention.named_modules()) == before
    shadow = _shadow(call.attention, call.keys, None)
    assert isinstance(shadow.o_proj, _Zeros)
    assert isinstance(shadow.qkv_proj.rest, _Zeros)
    assert shadow.qkv_proj.keys.expand is call.keys.expand
    assert call.attention.qkv_proj.keys is call.keys
    assert call.keys.on_latent == heard.append


def test_weights_are_read_when_keys_are_rebuilt(make_latent, tokens):
    model = make_latent("llama")
    call = Recorder(model, tokens)
    path = call.path(None)
    with torch.no_grad():
        call.keys.expand.weight.mul_(3)
    rebuilt = path.rebuild(call.latents, call.positions(slice(None)))
    assert torch.allclose(rebuilt, Recorder(model, tokens).states, atol=1e-12)
    assert not torch.allclose(rebuilt, call.states, atol=1e-3)


def test_an_attention_that_reads_the_tokens_of_its_call_fails(make_latent, tokens):
    call = Recorder(make_latent("llama"), tokens)

    class Reads(type(call.attention)):
        def forward(self, hidden_states, position_ids=None, **kwargs):
            return super().forward(hidden_states * (1 + position_ids[..., None]), **kwargs)

    call.attention.__class__ = Reads
    with pytest.raises(RuntimeError):
        call.path(None).rebuild(call.latents, call.positions(slice(None)))


def test_an_attention_that_does_not_cache_fails(make_latent, tokens):
    call = Recorder(make_latent("llama"), tokens)

    class Ignores(type(call.attention)):
        def forward(self, hidden_states, past_key_values=None, **kwargs):
            return super().forward(hidden_states, **kwargs)

    call.attention.__class__ = Ignores
    with pytest.raises((RuntimeError, NotImplementedError)):
        call.path(None).rebuild(call.latents, call.positions(slice(None)))
