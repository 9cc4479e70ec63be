"""Patterns that name linears, and the swap."""

import pytest
from torch import nn

from slimrank.errors import RecipeError
from slimrank.model import matches, replace_linear, select_targets

NAMES = [
    f"model.layers.{block}.{part}"
    for block in range(12)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
ALL = [*NAMES, "lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.1.mlp.up_proj", True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("p_proj", False),
        ("mlp", False),
        ("*.layers.1.*", True),
        ("*.layers.?.mlp.*", True),
        ("*.layers.[2-9].*", False),
        ("MODEL.*", False),
        (r"re:model\.layers\.\d+\.mlp", True),
        (r"re:.*up_proj$", True),
        (r"re:up_proj", False),
        ("", False),
    ],
)
def test_matches(pattern, expected):
    assert matches("model.layers.1.mlp.up_proj", pattern) is expected


def test_a_block_number_does_not_match_a_longer_one():
    chosen = select_targets(NAMES, ["*.layers.1.*"], (), ALL)
    assert [name.split(".")[2] for name in chosen] == ["1"] * 4


def test_all_targets_without_a_pattern():
    assert select_targets(NAMES, None, (), ALL) == NAMES


def test_targets_then_ignore_in_the_model_order():
    chosen = select_targets(NAMES, ["mlp.down_proj", "q_proj"], ["*.layers.1?.*"], ALL)
    assert chosen[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert len(chosen) == 20


def test_ignore_may_name_what_is_no_target():
    assert select_targets(NAMES, None, ["lm_head"], ALL) == NAMES


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["q_prjo"], [], r"targets \['q_prjo'\] match no linear; there are down_proj, o_proj, q_"),
        (["q_proj", "nope"], [], r"targets \['nope'\]"),
        (None, ["nope"], r"ignore \['nope'\] matches no module"),
        (["re:("], [], r"'re:\(' is no regular expression"),
        (None, ["re:["], r"'re:\[' is no regular expression"),
        (["q_proj"], ["self_attn.q_proj"], "leave nothing"),
        ([], [], "leave nothing"),
        (["lm_head"], [], "match no linear"),
    ],
)
def test_what_is_refused(targets, ignore, message):
    with pytest.raises(RecipeError, match=message):
        select_targets(NAMES, targets, ignore, ALL)


def test_replace_linear_swaps_one_module():
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    kept, new = model[0][0], nn.Identity()
    replace_linear(model, "0.1", new)
    assert model[0][1] is new
    assert model[0][0] is kept
