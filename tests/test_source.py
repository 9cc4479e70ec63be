"""Folders, hub ids and files are told apart; what is no dense causal model is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import slimrank
from slimrank.errors import ModelError, NumericalError, TextError
from slimrank.source import (
    load_model,
    load_skeleton,
    load_tokenizer,
    parse_source,
    require_dense,
    tokenize,
)


@pytest.fixture
def copied(tmp_path, dense_folder):
    return shutil.copytree(dense_folder, tmp_path / "copy")


def test_a_folder(dense_folder):
    source = parse_source(dense_folder)
    assert (source.name, source.location) == (str(dense_folder), str(dense_folder))
    assert not source.is_gguf
    assert parse_source(str(dense_folder)) == source


def test_a_relative_folder(dense_folder, monkeypatch):
    monkeypatch.chdir(dense_folder.parent)
    for name in (dense_folder.name, f"./{dense_folder.name}", "."):
        if name != ".":
            assert parse_source(name).location == str(name).removeprefix("./")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "org/model-v1.5"])
def test_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = parse_source(name)
    assert (source.name, source.location, source.options) == (name, name, {})


def test_a_gguf_file(tmp_path):
    path = tmp_path / "model.Q4_0.gguf"
    path.write_bytes(b"GGUF")
    source = parse_source(path)
    assert source.is_gguf
    assert source.location == str(tmp_path)
    assert source.options == {"gguf_file": "model.Q4_0.gguf"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "no such model folder"),
        ("../nothing", "no such model folder"),
        ("~/nothing", "no such model folder"),
        ("/nothing/here", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("nothing.gguf", "no such GGUF file"),
    ],
)
def test_what_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"{message}: {name}"):
        parse_source(name)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        parse_source(tmp_path)


def test_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        parse_source(path)


def test_a_folder_named_like_a_gguf_file(dense_folder, tmp_path):
    with pytest.raises(ModelError, match="no such GGUF file"):
        parse_source(shutil.copytree(dense_folder, tmp_path / "model.gguf"))


def test_a_hub_id_that_cannot_be_had():
    with pytest.raises(ModelError, match="cannot load nobody/nothing"):
        load_model(parse_source("nobody/nothing"))


def test_a_damaged_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        load_model(parse_source(path))


def other_models():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "vit": transformers.ViTConfig(**sizes, intermediate_size=32),
        "t5": transformers.T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=50),
        "clip": transformers.CLIPConfig(),
        "dinov2": transformers.Dinov2Config(**sizes),
    }


@pytest.mark.parametrize("kind", ["vit", "t5", "clip", "dinov2"])
@pytest.mark.parametrize("read", [load_model, load_skeleton])
def test_what_is_no_causal_language_model(kind, read, tmp_path):
    other_models()[kind].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"it is no causal language model|no file named"):
        read(parse_source(tmp_path))


def test_an_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    for read in (load_model, load_skeleton):
        with pytest.raises(ModelError, match="nonesuch"):
            read(parse_source(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (load_model, load_skeleton):
        with pytest.raises(ModelError):
            read(parse_source(tmp_path))


@pytest.mark.parametrize("damage", ["half", "empty", "header"])
def test_damaged_weights(copied, damage):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "half":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content[9] ^= 0x55
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_model(parse_source(copied))


def test_missing_weights_are_not_filled(copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj"
    ):
        load_model(parse_source(copied))


def test_weights_of_another_shape(copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(31,\)"):
        load_model(parse_source(copied))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(copied, bad):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds NaN"):
        load_model(parse_source(copied))


def test_a_loaded_model_is_in_eval_mode_and_of_the_dtype_asked(dense_folder):
    source = parse_source(dense_folder)
    assert not load_model(source).training
    for dtype in ("float32", "bfloat16", "float16"):
        model = load_model(source, dtype)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        skeleton = load_skeleton(source, dtype)
        assert {p.dtype for p in skeleton.parameters()} == {getattr(torch, dtype)}
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_the_dtype_of_the_folder(make_folder, dtype):
    source = parse_source(make_folder("llama", dtype=dtype))
    assert next(load_model(source).parameters()).dtype == dtype
    assert next(load_skeleton(source).parameters()).dtype == dtype


def test_auto_is_the_same_for_both_where_the_config_is_silent(make_folder):
    folder = make_folder("llama", dtype=torch.bfloat16)
    values = json.loads((folder / "config.json").read_text())
    values.pop("dtype")
    (folder / "config.json").write_text(json.dumps(values))
    source = parse_source(folder)
    loaded, skeleton = load_model(source), load_skeleton(source)
    assert next(loaded.parameters()).dtype == next(skeleton.parameters()).dtype


def test_a_folder_without_a_tokenizer(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(TextError, match="has no tokenizer"):
        load_tokenizer(parse_source(copied))


def test_tokenize(tiny_tokenizer):
    ids = tokenize(tiny_tokenizer, "ab\nc")
    assert ids.dtype == torch.int64
    assert tiny_tokenizer.decode(ids).replace(" ", "") == "<s>ab\nc"


def test_a_text_of_no_tokens():
    def none(_text, **_kwargs):
        return {"input_ids": torch.zeros(1, 0)}

    with pytest.raises(TextError, match="it gives no token"):
        tokenize(none, "")


def test_a_compressed_folder_is_refused(compressed_folder, make_recipe, tmp_path):
    with pytest.raises(ModelError, match="compressed already"):
        slimrank.compress(compressed_folder, make_recipe(), out=tmp_path / "out")
    with pytest.raises(ModelError, match="compressed already"):
        require_dense(slimrank.load(compressed_folder), "m")


def test_a_quantised_model_is_refused(make_model):
    model = make_model("llama")
    model.hf_quantizer = object()
    with pytest.raises(ModelError, match="is quantised; compress first"):
        require_dense(model, "m")
