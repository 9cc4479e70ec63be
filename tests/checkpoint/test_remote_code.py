"""Folders carry the modelling file where they are asked to, and nowhere else name it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import slimrank
from slimrank import CompressionOptions, compress, quantize
from slimrank.checkpoint import (
    LowRankQuantizer,
    add_remote_code,
    has_remote_code,
    modeling_low_rank,
    remote_code,
    require_served_by_code,
)
from slimrank.errors import CheckpointError, ModelError
from slimrank.nn import LowRankLinear
from tiny.folders import logits_of

AUTO_MAP = {"AutoModelForCausalLM": "modeling_low_rank.LowRankForCausalLM"}
CODE = remote_code.REMOTE_CODE


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def carrying(dense_folder, make_recipe, windows, tmp_path_factory):
    """A compressed Llama with the file; not to be changed."""
    out = tmp_path_factory.mktemp("carrying") / "llama"
    recipe, options = make_recipe(layout="auto"), CompressionOptions(remote_code=True)
    compress(dense_folder, recipe, out=out, windows=windows, options=options)
    return out


def test_compress_writes_it_if_it_is_asked_to(carrying, compressed_folder):
    assert (carrying / CODE).read_bytes() == Path(modeling_low_rank.__file__).read_bytes()
    assert config_of(carrying)["auto_map"] == AUTO_MAP
    assert has_remote_code(carrying)
    assert f"runs the short file\n`{CODE}`" in (carrying / "README.md").read_text()
    assert not has_remote_code(compressed_folder)
    assert "auto_map" not in config_of(compressed_folder)
    assert CODE not in (compressed_folder / "README.md").read_text()


def test_it_changes_nothing_for_slimrank(carrying, probe):
    models = [
        slimrank.load(carrying),
        AutoModelForCausalLM.from_pretrained(carrying),
        AutoModelForCausalLM.from_pretrained(carrying, trust_remote_code=True),
    ]
    for model in models:
        assert isinstance(model, LlamaForCausalLM)
        assert isinstance(model.hf_quantizer, LowRankQuantizer)
        assert any(isinstance(module, LowRankLinear) for module in model.modules())
        assert torch.equal(logits_of(model, probe), logits_of(models[0], probe))


def test_what_is_saved_names_no_file_that_is_not_there(carrying, tmp_path):
    slimrank.load(carrying).save_pretrained(tmp_path / "plain")
    assert "auto_map" not in config_of(tmp_path / "plain")
    assert not (tmp_path / "plain" / CODE).exists()
    trusted = AutoModelForCausalLM.from_pretrained(carrying, trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "trusted")
    assert has_remote_code(tmp_path / "trusted")


def test_eight_bits_keep_it_and_packed_factors_drop_it(make_folder, make_recipe, windows, tmp_path):
    recipe, options = make_recipe(dtype="bfloat16"), CompressionOptions(remote_code=True)
    source = tmp_path / "source"
    compress(make_folder("llama"), recipe, out=source, windows=windows, options=options)
    quantize(source, tmp_path / "rows")
    assert has_remote_code(tmp_path / "rows")
    assert CODE in (tmp_path / "rows" / "README.md").read_text()
    quantize(source, tmp_path / "packed", packing="remapped")
    assert not (tmp_path / "packed" / CODE).exists()
    assert "auto_map" not in config_of(tmp_path / "packed")
    assert CODE not in (tmp_path / "packed" / "README.md").read_text()
    with pytest.raises(ModelError, match="cannot load packed factors; only slimrank can"):
        require_served_by_code(slimrank.load(tmp_path / "packed"))


def test_what_it_cannot_load_is_refused_before_any_work(
    make_folder, make_recipe, windows, tmp_path, monkeypatch
):
    def work(*_):
        raise AssertionError("begun")

    monkeypatch.setattr("slimrank.compression.make", work)
    with pytest.raises(ModelError, match="cannot load projections that were taken apart"):
        compress(
            make_folder("phi3"),
            make_recipe(kv_cache={"keep": 0.5}),
            out=tmp_path / "out",
            windows=windows,
            options=CompressionOptions(remote_code=True),
        )
    assert not list(tmp_path.iterdir())


def test_a_class_of_ones_own_is_refused(make_model):
    model = make_model("llama")
    model.__class__ = type("Mine", (LlamaForCausalLM,), {})
    with pytest.raises(ModelError, match="no class for, as Mine"):
        require_served_by_code(model)


def test_code_that_was_named_before_is_not_named_any_more(copied, carrying):
    path = copied / "config.json"
    foreign = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    path.write_text(json.dumps(config_of(copied) | {"auto_map": foreign}))
    model = slimrank.load(copied)
    assert model.config.auto_map == foreign  # only our own is forgotten
    add_remote_code(model, copied)
    assert config_of(copied) == config_of(carrying)


@pytest.mark.parametrize("damage", [None, 7, [], "x", {"AutoModelForCausalLM": 7}], ids=str)
def test_what_names_no_file_is_not_ours(damage, copied):
    (copied / CODE).touch()
    path = copied / "config.json"
    path.write_text(json.dumps(config_of(copied) | {"auto_map": damage}))
    assert not has_remote_code(copied)


def test_a_hub_may_stand_before_the_name(carrying):
    config = slimrank.load(carrying).config
    config.auto_map = {"AutoModelForCausalLM": f"someone/model--{remote_code.REFERENCE}"}
    remote_code.forget_remote_code(config)
    assert not hasattr(config, "auto_map")


def test_it_is_read_back(copied, monkeypatch):
    model = slimrank.load(copied)
    monkeypatch.setattr(Path, "write_bytes", lambda path, _: path.touch())
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        add_remote_code(model, copied)
