"""The configuration of a compressed checkpoint: hostile values are refused, good ones read back."""

import inspect
import json

import pytest
from transformers import AutoModelForCausalLM

import slimrank
from slimrank.checkpoint import LowRankConfig, LowRankLinearConfig, read_folder
from slimrank.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj"


def test_round_trip():
    config = LowRankConfig(linears={NAME: {"rank": 4}, "b": LowRankLinearConfig(rank=9)})
    values = json.loads(json.dumps(config.to_dict()))
    assert LowRankConfig(**values).to_dict() == values
    assert LowRankConfig.from_dict(values).linears == config.linears
    assert values["linears"][NAME] == {"rank": 4, "pivoted": False}


@pytest.mark.parametrize(
    "rank", [0, -1, 4.0, 4.5, "4", None, True, [4], {"rank": 4}, float("nan"), float("inf")]
)
def test_a_rank_is_a_positive_whole_number(rank):
    with pytest.raises(CheckpointError, match=rf"linears\.{NAME}\.rank"):
        LowRankConfig(linears={NAME: {"rank": rank}})


@pytest.mark.parametrize("value", [None, 4, "4", [], [["rank", 4]], {}])
def test_a_linear_is_a_mapping_with_a_rank(value):
    with pytest.raises(CheckpointError, match=NAME):
        LowRankConfig(linears={NAME: value})


def test_unknown_keys_of_a_linear_are_refused():
    with pytest.raises(CheckpointError, match=rf"{NAME}\.ranks"):
        LowRankConfig(linears={NAME: {"rank": 4, "ranks": 5}})


def test_the_pivoted_layout_is_kept():
    config = LowRankConfig(linears={NAME: {"rank": 4, "pivoted": True}})
    assert LowRankConfig(**config.to_dict()).linears[NAME].pivoted


def test_what_packed_factors_need_is_kept():
    remapped = {"dtype": "bfloat16", "out_features": 9, "in_features": 8}
    config = LowRankConfig(linears={NAME: {"rank": 4, "remapped": remapped}, "b": {"rank": 2}})
    values = json.loads(json.dumps(config.to_dict()))
    assert values["format_version"] == 3
    assert values["linears"][NAME]["remapped"] == remapped
    assert values["linears"]["b"] == {"rank": 2, "pivoted": False}
    assert LowRankConfig(**values).linears == config.linears
    assert config.int8_linears == [NAME]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"linears": []}, "no mapping"),
        ({"linears": None}, "no mapping"),
        ({"linears": "all"}, "no mapping"),
        ({"linears": {}, "bits": 4}, "unknown keys: bits"),
        ({"linears": {}, "quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"linears": {}, "format_version": 4}, "format version 4; .* upgrade slimrank"),
        ({"linears": {}, "format_version": 0}, "format version 0"),
        ({"linears": {}, "format_version": "1"}, "format version 1"),
        ({"linears": {}, "format_version": None}, "format version None"),
        ({}, "linears"),
        ({"format_version": 1}, "linears"),
    ],
)
def test_what_else_is_refused(values, message):
    # Without the type checks that the test run adds: a file's values have no types yet.
    config = object.__new__(LowRankConfig)
    with pytest.raises(CheckpointError, match=message):
        inspect.unwrap(LowRankConfig.__init__)(config, **values)


HOSTILE = [
    ({"quant_method": "low_rank", "format_version": 1}, "linears"),
    ({"linears": {NAME: {"rank": -3}}}, NAME),
    ({"linears": {NAME: {"rank": 0}}}, NAME),
    ({"linears": {NAME: {"rank": 33}}}, f"{NAME} rank 33, over 32"),
    ({"linears": {NAME: {"rank": 10**30}}}, f"{NAME} rank 1000000000"),
    ({"linears": {NAME: {"rank": "5"}}}, NAME),
    ({"linears": {NAME: {"rank": 5.0}}}, NAME),
    ({"linears": {NAME: {"rank": 5, "pivoted": True}}}, NAME),
    ({"linears": {NAME: {"rank": 5, "path": "/etc/passwd"}}}, NAME),
    ({"linears": {"model.layers.9.mlp.up_proj": {"rank": 5}}}, r"lists model\.layers\.9"),
    ({"linears": {"model.layers.0": {"rank": 5}}}, r"model\.layers\.0, which is no linear"),
    ({"linears": {"model.embed_tokens": {"rank": 5}}}, "which is no linear"),
    ({"linears": {"": {"rank": 5}}}, "which is no linear"),
    ({"linears": {NAME: {"rank": 4}}}, f"{NAME}.*shape"),
    ({"linears": {}}, "factors that config.json does not list"),
    ({"linears": {NAME: {"rank": 5}}, "format_version": 99}, "format version 99"),
    ({"linears": {NAME: {"rank": 5}}, "trust": True}, "unknown keys: trust"),
]


@pytest.mark.parametrize(("values", "message"), HOSTILE)
def test_a_hostile_config_does_not_load(copied, values, message):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "low_rank", **values}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(copied)
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("entry", ["low_rank", ["low_rank"], 7, {"quant_method": "low_rank"}])
def test_read_folder_refuses_an_entry_that_is_no_configuration(copied, entry):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = entry
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        read_folder(copied)


SPLIT = {"keys": [[32, 48]], "values": [[48, 64]]}
LATENTS = {"keys": "a.k_proj", "values": "a.v_proj"}
KV_LINEARS = {"a.k_proj": {"rank": 4}, "a.v_proj": {"rank": 4}}


def test_splits_and_latents_round_trip():
    config = LowRankConfig(linears=KV_LINEARS, splits={"b.qkv": SPLIT}, kv_cache={"a": LATENTS})
    values = json.loads(json.dumps(config.to_dict()))
    assert values["splits"] == {"b.qkv": SPLIT}
    assert values["kv_cache"] == {"a": LATENTS}
    again = LowRankConfig(**values)
    assert again.to_dict() == values
    assert (again.splits, again.kv_cache) == (config.splits, config.kv_cache)
    assert again.splits["b.qkv"].keys == ((32, 48),)


def test_without_them_the_file_is_as_before():
    assert LowRankConfig(linears={NAME: {"rank": 4}}).to_dict().keys() == {
        "quant_method",
        "format_version",
        "linears",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"splits": {"b.qkv": {"keys": [[0, 4]]}}}, r"splits\.b\.qkv\.values"),
        ({"splits": {"b.qkv": SPLIT | {"keys": []}}}, r"splits\.b\.qkv\.keys"),
        ({"splits": {"b.qkv": SPLIT | {"keys": [[0, 4, 8]]}}}, r"splits\.b\.qkv\.keys\.0"),
        ({"splits": {"b.qkv": SPLIT | {"keys": [["a", 4]]}}}, r"splits\.b\.qkv\.keys\.0"),
        ({"splits": {"b.qkv": SPLIT | {"queries": [[0, 4]]}}}, r"splits\.b\.qkv\.queries"),
        ({"splits": {"b.qkv": None}}, r"splits\.b\.qkv"),
        ({"kv_cache": {"a": {"keys": "a.k_proj"}}}, r"kv_cache\.a\.values"),
        ({"kv_cache": {"a": LATENTS | {"path": "/"}}}, r"kv_cache\.a\.path"),
        ({"kv_cache": {"a": LATENTS | {"keys": 3}}}, r"kv_cache\.a\.keys"),
        ({"kv_cache": {"a": "a.k_proj"}}, r"kv_cache\.a"),
        ({"kv_cache": {"a": LATENTS | {"keys": "a.q"}}}, r"names a\.q, which is not factorised"),
    ],
)
def test_bad_splits_and_latents_are_refused_by_key(values, message):
    with pytest.raises(CheckpointError, match=message):
        LowRankConfig(linears=KV_LINEARS, **values)


@pytest.mark.parametrize("part", ["splits", "kv_cache", "rounded"])
def test_parts_are_mappings(part):
    with pytest.raises(CheckpointError, match=f"{part} is no mapping"):
        LowRankConfig(linears={}, **{part: [1]})


def test_a_key_with_the_name_of_an_argument_of_python():
    with pytest.raises(CheckpointError, match="unknown keys: self"):
        LowRankConfig(**{"linears": {}, "self": 1})


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "\x1b[31m"])
def test_a_name_can_be_printed(name):
    with pytest.raises(CheckpointError, match="linears has a name that is none"):
        LowRankConfig(linears={name: {"rank": 4}})


def test_sides_of_packed_factors_are_of_a_size_that_can_be(copied):
    remapped = {"dtype": "bfloat16", "out_features": 10**30, "in_features": 8}
    with pytest.raises(CheckpointError, match=r"remapped\.out_features"):
        LowRankConfig(linears={NAME: {"rank": 4, "remapped": remapped}})
