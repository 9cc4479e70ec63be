"""The plugin for SGLang, on a stand-in for it: SGLang needs a GPU and was not run."""

import importlib
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import serving.sglang_stand_in as sglang
from slimrank.checkpoint import LowRankConfig
from slimrank.errors import CheckpointError

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8
HIDDEN, INNER = 32, 48
PLUGIN = "slimrank.serving.sglang_plugin"
MIXED = ["layers.0.mlp.up_proj", "layers.1.self_attn.k_proj"]  # dense within what is fused
ADDED = {"packed_modules_mapping": {}, "hf_config": object()}


@pytest.fixture(scope="module")
def plugin():
    assert "sglang" not in sys.modules
    with sglang.imported():
        yield importlib.import_module(PLUGIN)
    del sys.modules[PLUGIN]


@pytest.fixture(scope="module", params=["plain", "pivoted"])
def stored(request, make_compressed):
    """A compressed Qwen2, its tensors and what its config.json has."""
    model, _ = make_compressed("qwen2", layout=request.param, ignore=MIXED)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return SimpleNamespace(
        model=model,
        tensors=model.state_dict(),
        config=model.config.quantization_config.to_dict() | ADDED,
    )


def built(served, part, parts, kv_parts=None):
    """The linears of a Qwen2 as one process of several has them."""
    group = sglang.Group(part, parts) if parts > 1 else None
    kv_parts = kv_parts or parts
    kv_group = sglang.Group(part * kv_parts // parts, kv_parts) if kv_parts > 1 else None
    root = nn.Module()
    root.model = nn.Module()
    root.model.layers = nn.ModuleList()
    for number in range(2):
        block, prefix = nn.Module(), f"model.layers.{number}"
        block.self_attn, block.mlp = nn.Module(), nn.Module()
        block.self_attn.qkv_proj = sglang.QKVParallelLinear(
            *(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, True),
            *(served, f"{prefix}.self_attn.qkv_proj", group, kv_group),
        )
        block.self_attn.o_proj = sglang.RowParallelLinear(
            HIDDEN, HIDDEN, False, served, f"{prefix}.self_attn.o_proj", group
        )
        block.mlp.gate_up_proj = sglang.ColumnParallelLinear(
            HIDDEN, [INNER, INNER], False, served, f"{prefix}.mlp.gate_up_proj", group
        )
        block.mlp.down_proj = sglang.RowParallelLinear(
            INNER, HIDDEN, False, served, f"{prefix}.mlp.down_proj", group
        )
        root.model.layers.append(block)
    return root


def loaded(plugin, stored, part=0, parts=1, kv_parts=None):
    engine = built(plugin.LowRankServing.from_config(stored.config), part, parts, kv_parts)
    sglang.load_weights(engine, stored.tensors)
    sglang.postprocess_weights(engine)
    return engine


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own(tensor, part, parts):
    width = tensor.shape[-1] // parts
    return tensor[..., part * width : (part + 1) * width]


@torch.no_grad()
@pytest.mark.parametrize(("parts", "kv_parts"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_processes_together_say_what_the_model_says(plugin, stored, parts, kv_parts):
    engines = [loaded(plugin, stored, part, parts, kv_parts) for part in range(parts)]
    hidden, inner = normal(1, 3, HIDDEN), normal(2, 3, INNER)
    for number, block in enumerate(stored.model.model.layers):
        found = [engine.model.layers[number] for engine in engines]
        attention, mlp = block.self_attn, block.mlp
        q, k, v = (
            linear(hidden) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        wide = [mlp.gate_proj(hidden), mlp.up_proj(hidden)]
        for part, here in enumerate(found):
            heads = min(KV_HEADS, kv_parts)
            first = part * heads // parts
            expected = [own(q, part, parts), own(k, first, heads), own(v, first, heads)]
            outputs = here.self_attn.qkv_proj(hidden)
            torch.testing.assert_close(outputs, torch.cat(expected, -1))
            outputs = here.mlp.gate_up_proj(hidden)
            torch.testing.assert_close(outputs, torch.cat([own(x, part, parts) for x in wide], -1))
        for linear, name, inputs in (
            (attention.o_proj, "self_attn.o_proj", hidden),
            (mlp.down_proj, "mlp.down_proj", inner),
        ):
            pieces = [
                here.get_submodule(name)(own(inputs, part, parts))
                for part, here in enumerate(found)
            ]
            torch.testing.assert_close(torch.stack(pieces).sum(0), linear(inputs))


@torch.no_grad()
def test_a_linear_that_is_on_all_processes(plugin, stored):
    served = plugin.LowRankServing.from_config(stored.config)
    name = "model.layers.0.self_attn.o_proj"
    linear = sglang.ReplicatedLinear(HIDDEN, HIDDEN, served, name)
    prefix = f"{name}."
    own = {k.removeprefix(prefix): t for k, t in stored.tensors.items() if k.startswith(prefix)}
    sglang.load_weights(linear, own)
    sglang.postprocess_weights(linear)
    inputs = normal(3, 2, HIDDEN)
    torch.testing.assert_close(linear(inputs), stored.model.get_submodule(name)(inputs))


@pytest.mark.parametrize("lost", ["q_proj.latent.weight", "v_proj.weight", "k_proj.weight"])
def test_a_tensor_that_is_missing_or_called_otherwise_is_an_error(plugin, stored, lost):
    name = f"model.layers.1.self_attn.{lost}"
    tensors = dict(stored.tensors)
    tensors[name.replace("self_attn", "attention")] = tensors.pop(name)
    engine = built(plugin.LowRankServing.from_config(stored.config), 0, 1)
    sglang.load_weights(engine, tensors)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of a linear, such as {name}"):
        sglang.postprocess_weights(engine)
    linear = engine.model.layers[1].self_attn.qkv_proj
    with pytest.raises(CheckpointError, match=r"runs model\.layers\.1\.self_attn\.q_proj before"):
        linear(normal(1, 1, HIDDEN))


def test_weights_are_not_exchanged(plugin, stored):
    linear = loaded(plugin, stored).model.layers[0].mlp.down_proj
    with pytest.raises(CheckpointError, match="cannot exchange the weights of a compressed"):
        linear.quant_method.restore_weights_before_loading(linear)


def test_other_layers_are_left_to_it(plugin, stored):
    served = plugin.LowRankServing.from_config(stored.config)
    linear = sglang.LinearBase(served, "model.layers.0.mlp.router")
    assert type(linear.quant_method) is sglang.UnquantizedLinearMethod
    assert served.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_one_matrix_that_is_several_there_is_refused(plugin):
    name = "model.layers.0.self_attn.qkv_proj"
    served = plugin.LowRankServing.from_config(LowRankConfig({name: {"rank": 4}}).to_dict() | ADDED)
    with pytest.raises(CheckpointError, match=rf"SGLang cannot serve factors of {name}: .* 3 mat"):
        sglang.QKVParallelLinear(
            HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, False, served, name, None, None
        )


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            {"linears": {}, "splits": {"fc": {"keys": [[0, 1]], "values": [[1, 2]]}}},
            "projections taken apart",
        ),
    ],
)
def test_what_it_cannot_serve_is_refused(values, what, plugin):
    with pytest.raises(CheckpointError, match=f"SGLang cannot serve this folder: it has {what}"):
        plugin.LowRankServing.from_config(values | ADDED)


def test_unknown_keys_are_errors_as_ever(plugin):
    with pytest.raises(CheckpointError, match="unknown keys: strange"):
        plugin.LowRankServing.from_config({"linears": {}, "strange": 1, **ADDED})


def test_names_are_mapped_and_what_a_model_fuses_otherwise_is_known(plugin):
    served = plugin.LowRankServing.from_config(
        {"linears": {"a.fc1": {"rank": 2}}, "packed_modules_mapping": {"fc": ["fc1", "fc2"]}}
    )
    mapper = SimpleNamespace(apply_dict=lambda d: {f"b.{name}": x for name, x in d.items()})
    served.apply_weight_name_mapper(mapper)
    assert served.factors_of("b.a.fc") == (
        ["b.a.fc1", "b.a.fc2"],
        [served.linears["b.a.fc1"], None],
    )
    assert served.factors_of("b.a.gate_up_proj") is None


def test_it_is_registered_once_under_the_name_that_is_stored(plugin):
    plugin.register()
    plugin.register()
    assert plugin.QUANTIZATION_METHODS["low_rank"] is plugin.LowRankServing
    assert sglang.CHOICES == ["low_rank"]
    served = plugin.LowRankServing.from_config({"linears": {}})
    assert (served.get_name(), served.get_min_capability()) == ("low_rank", 0)
    assert (served.get_config_filenames(), served.get_scaled_act_names()) == ([], [])
    assert torch.bfloat16 in served.get_supported_act_dtypes()


def test_its_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    groups = project["project"]["entry-points"]
    assert groups["sglang.srt.plugins"] == {"slimrank": f"{PLUGIN}:register"}
