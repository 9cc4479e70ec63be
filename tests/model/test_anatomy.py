"""Blocks, groups and call order, found without knowing a name; what is refused, and how."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from slimrank.errors import CoverageWarning, ModelError
from slimrank.model import block_path, discover, list_sites, outline

QUIET = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")

LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen2_tied": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "gemma3": ("model.layers", LLAMA),
    "olmo2": ("model.layers", LLAMA),
    "phi3": (
        "model.layers",
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    ),
    "opt": (
        "model.decoder.layers",
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.out_proj"],
            ["fc1"],
            ["fc2"],
        ],
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        [
            ["attention.query_key_value"],
            ["attention.dense"],
            ["mlp.dense_h_to_4h"],
            ["mlp.dense_4h_to_h"],
        ],
    ),
    "falcon": (
        "transformer.h",
        [
            ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
            ["self_attention.dense"],
            ["mlp.dense_4h_to_h"],
        ],
    ),
    "mixtral": ("model.layers", LLAMA[:2]),
    "qwen3_moe": ("model.layers", LLAMA[:2]),
}


@pytest.fixture
def ids():
    return torch.arange(12)[None]


def groups_of(anatomy):
    return [[[site.name for site in group.sites] for group in block] for block in anatomy.groups]


def hooks_of(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        yield from module._forward_pre_hooks.values()
        yield from module._forward_hooks.values()


@QUIET
def test_blocks_groups_and_order_of_each_family(family, make_model, ids):
    model = make_model(family)
    path, expected = EXPECTED[family]
    anatomy = discover(model, ids)
    assert anatomy.path == block_path(model) == path
    found = groups_of(anatomy)
    for block, groups in enumerate(found):
        assert groups == [[f"{path}.{block}.{name}" for name in group] for group in expected]
    assert len(found) == 2
    assert not list(hooks_of(model))
    for site in anatomy.sites:
        linear = model.get_submodule(site.name)
        assert (site.shape.out_features, site.shape.in_features) == linear.weight.shape
        assert site.has_bias == (linear.bias is not None)
        assert f".{site.block}." in site.name


@QUIET
def test_meta_device_gives_the_same_anatomy(family, make_model, make_skeleton, ids, tiny):
    expected = discover(make_model(family), ids)
    model = make_skeleton(family)
    found = discover(model, ids.to("meta"))
    assert found.path == expected.path
    assert {site.name: site for site in found.sites} == {s.name: s for s in expected.sites}
    if family in tiny.FUSED:  # routing looks at values, so what comes after it counts by itself
        assert groups_of(found)[0] == groups_of(expected)[0]
        assert all(len(group) == 1 for group in groups_of(found)[1])
    else:
        assert groups_of(found) == groups_of(expected)
    assert not list(hooks_of(model))


def test_only_drops_empty_groups(make_model, ids):
    anatomy = discover(make_model("llama"), ids)
    some = anatomy.only(["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
    assert groups_of(some) == [
        [],
        [["model.layers.1.self_attn.k_proj"], ["model.layers.1.mlp.down_proj"]],
    ]
    assert some.groups[1][1].in_features == 48


def test_gpt2_is_refused_by_name(make_model, ids):
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D.*GPT-2"):
        discover(make_model("gpt2"), ids)


@pytest.mark.parametrize("experts", [4, 6])
def test_listed_experts_are_found_and_routers_left_out(make_experts_model, ids, experts):
    model = make_experts_model(experts=experts, top=2)
    anatomy = discover(model, torch.arange(90)[None])
    names = [site.name for site in anatomy.sites]
    assert not [name for name in names if name.endswith("mlp.gate")]
    assert sum("experts" in name for name in names) == 2 * experts * 3
    assert len(set(names)) == len(names)
    groups = groups_of(anatomy)[0]
    for expert in range(experts):
        stem = f"model.layers.0.mlp.experts.{expert}"
        assert [f"{stem}.gate_proj", f"{stem}.up_proj"] in groups
        assert [f"{stem}.down_proj"] in groups


def test_an_expert_that_the_probe_missed_is_a_group_of_its_own(make_experts_model, ids):
    anatomy = discover(make_experts_model(closed=(2,)), ids)
    groups = groups_of(anatomy)[1]
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert [f"model.layers.1.mlp.experts.2.{part}"] in groups


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_told(family, make_model):
    model = make_model(family)
    with pytest.warns(CoverageWarning, match=r"fused tensors stay dense.*model\.layers\.0\.mlp"):
        list_sites(model, "model.layers")


class Branches(nn.Module):
    """Two lists of blocks, as in a model of text and images."""

    def __init__(self, lists: int) -> None:
        super().__init__()
        for number in range(lists):
            setattr(self, f"tower{number}", nn.ModuleList([nn.Linear(4, 4)]))
        self.nothing = nn.ModuleList([nn.LayerNorm(4)])


def test_two_block_lists_are_named_and_the_key_settles_it():
    model = Branches(2)
    with pytest.raises(ModelError, match=r"'tower0', 'tower1'.*'blocks'"):
        block_path(model)
    assert block_path(model, "tower1") == "tower1"
    with pytest.raises(ModelError, match=r"no block list 'tower7'.*'tower0', 'tower1'"):
        block_path(model, "tower7")
    with pytest.raises(ModelError, match="no block list 'nothing'"):
        block_path(model, "nothing")


def test_no_block_list_is_an_error():
    with pytest.raises(ModelError, match="Branches has no list of blocks"):
        block_path(Branches(0))


def test_inner_list_can_be_named(make_experts_model):
    model = make_experts_model()
    assert block_path(model) == "model.layers"
    inner = "model.layers.0.mlp.experts"
    assert block_path(model, inner) == inner
    assert len(list_sites(model, inner)) == 4 * 3


def test_weights_shared_between_blocks_are_refused(make_model):
    model = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj shares its weight with .*0\.mlp\.up_proj"
    ):
        list_sites(model, "model.layers")


def test_one_block_used_twice_is_refused(make_model):
    model = make_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ModelError, match="shares its weight"):
        list_sites(model, "model.layers")


def test_one_linear_under_two_names_in_a_block_is_refused(make_model):
    model = make_model("llama")
    block = model.model.layers[0]
    block.self_attn.v_proj = block.self_attn.k_proj
    with pytest.raises(ModelError, match="shares its weight"):
        list_sites(model, "model.layers")


def packed_by_dtype(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), False)


def packed_by_shape(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().reshape(-1, 1))


@pytest.mark.parametrize("pack", [packed_by_dtype, packed_by_shape])
def test_a_packed_linear_is_refused(make_model, pack):
    model = make_model("llama")
    pack(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(ModelError, match=r"1\.self_attn\.o_proj is no plain floating-point.*quant"):
        list_sites(model, "model.layers")


def test_hooks_are_removed_when_the_forward_fails(make_model, ids):
    model = make_model("llama")

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    model.model.layers[1].mlp.act_fn.forward = fail
    with pytest.raises(ZeroDivisionError):
        discover(model, ids)
    assert not list(hooks_of(model))


@QUIET
def test_nothing_of_the_model_changes(family, make_model, ids):
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    discover(model, ids)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


@QUIET
def test_an_outline_is_what_is_found_of_the_dense_model(family, make_model, make_compressed):
    probe = torch.arange(4, 12)[None]
    dense = discover(make_model(family), probe)
    small, _ = make_compressed(family)
    for model in (make_model(family), small):
        found = outline(model, probe)
        assert (found.path, found.extra_outputs) == (dense.path, dense.extra_outputs)
        assert found.groups == ()
        assert not model.get_submodule(found.path)[-1]._forward_hooks
