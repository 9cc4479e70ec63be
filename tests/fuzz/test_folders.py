"""Model folders, dense and compressed: configuration, headers, index, links, code, pickle."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimrank
from fuzz.mutation import HOSTILE_NAMES, as_json, mutated, spoiled, spoiled_tensors, with_header
from fuzz.properties import (
    contents,
    examples,
    nothing_else_touched,
    put_back,
    right_or_refused,
)
from slimrank.checkpoint import read_folder, read_headers
from slimrank.checkpoint.size import weight_file_bytes
from slimrank.errors import CheckpointError, ModelError
from slimrank.source import load_model, load_skeleton, load_tokenizer, parse_source
from tiny.folders import logits_of

KINDS = ("dense", "pivoted", "int8", "latent", "packed")
PROBE = torch.arange(12)[None]


def read_all(folder):
    """Read a folder in every way there is; the model, if it loads."""
    with nothing_else_touched(folder):
        right_or_refused(lambda: read_folder(folder))
        right_or_refused(lambda: load_skeleton(parse_source(folder)))
        return right_or_refused(lambda: slimrank.load(folder))


def spoil_file(folder, name, content):
    """Read a folder with another file in it, and put it back."""
    before = contents(folder)
    (folder / name).write_bytes(content)
    try:
        return read_all(folder)
    finally:
        put_back(folder, before)


@pytest.fixture(scope="module")
def configs(valid):
    return {kind: json.loads((valid / kind / "config.json").read_bytes()) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_valid_folders_load(spoil, kind):
    model = read_all(spoil(kind))
    assert torch.isfinite(logits_of(model, PROBE)).all()


@examples(20)
@given(data=st.data())
def test_changed_entries(spoil, configs, data):
    kind = data.draw(st.sampled_from(KINDS[1:]))
    config = configs[kind]
    entry = data.draw(mutated(config["quantization_config"]))
    changed = {**config, "quantization_config": entry}
    spoil_file(spoil(kind), "config.json", as_json(changed))


@examples(20)
@given(data=st.data())
def test_changed_configurations(spoil, configs, data):
    kind = data.draw(st.sampled_from(("dense", "pivoted", "latent")))
    spoil_file(spoil(kind), "config.json", as_json(data.draw(mutated(configs[kind]))))


@examples(30)
@given(data=st.data())
def test_spoiled_configurations(spoil, configs, data):
    spoil_file(spoil("pivoted"), "config.json", data.draw(spoiled(as_json(configs["pivoted"]))))


@examples(20)
@given(data=st.data())
def test_spoiled_weights(spoil, valid, data):
    kind = data.draw(st.sampled_from(("pivoted", "int8", "packed")))
    content = data.draw(spoiled_tensors((valid / kind / "model.safetensors").read_bytes()))
    spoil_file(spoil(kind), "model.safetensors", content)


@examples(40)
@given(data=st.data())
def test_headers_of_spoiled_weights(tmp_path_factory, valid, data):
    content = data.draw(spoiled_tensors((valid / "int8" / "model.safetensors").read_bytes()))
    folder = tmp_path_factory.mktemp("headers")
    path = folder / "model.safetensors"
    path.write_bytes(content)
    right_or_refused(lambda: read_headers([path]), path)
    assert weight_file_bytes(folder) == len(content)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**40, 0, 2**40], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**64], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"../a\0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"},
        [1, 2],
        None,
    ],
)
def test_hostile_headers(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(b"\0" * 16, header))
    right_or_refused(lambda: read_headers([path]), path)


@pytest.mark.parametrize("kind", ["dense", "pivoted"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 3_000},
        {"vocab_size": 10**9},
        {"vocab_size": 10**7},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**7},
        {"head_dim": 10**7},
        {"num_key_value_heads": 10**6},
        {"num_attention_heads": -4},
        {"vocab_size": -1},
        {"pad_token_id": 10**6},
        {"model_type": "no_such_model"},
        {"model_type": "gpt2"},
        {"dtype": "os.system"},
        {"hidden_act": "os.system"},
        {"transformers_weights": "../out.safetensors"},
        {"_attn_implementation": "somebody/kernels"},
        {"attn_implementation": {"": "somebody/kernels@main"}},
    ],
    ids=str,
)
def test_hostile_configurations_are_refused_before_anything_is_made(spoil, configs, kind, changes):
    folder = spoil(kind)
    assert spoil_file(folder, "config.json", as_json({**configs[kind], **changes})) is None


@examples(20)
@given(name=st.sampled_from(HOSTILE_NAMES), rank=st.sampled_from((0, -1, 10**9, 2**63, 10**30)))
def test_hostile_ranks_and_names(spoil, configs, name, rank):
    config = configs["pivoted"]
    listed = next(iter(config["quantization_config"]["linears"]))
    for linears in ({name: {"rank": 4}}, {listed: {"rank": rank}}):
        entry = {**config["quantization_config"], "linears": linears}
        changed = {**config, "quantization_config": entry}
        assert spoil_file(spoil("pivoted"), "config.json", as_json(changed)) is None


def sharded(folder, name):
    """Let an index name the weights."""
    headers = read_headers([folder / "model.safetensors"])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(headers, name)}
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["dense", "pivoted"])
@pytest.mark.parametrize("name", ["../out.safetensors", "ABSOLUTE", "in/../../out.safetensors"])
def test_weights_outside_of_the_folder(spoil, valid, tmp_path_factory, kind, name):
    folder, before = spoil(kind), contents(spoil(kind))
    out = folder.parent / "out.safetensors"
    out.write_bytes(before["model.safetensors"])
    try:
        sharded(folder, str(out) if name == "ABSOLUTE" else name)
        for read in (
            slimrank.load,
            lambda path: load_model(parse_source(path)),
            *([read_folder] if kind == "pivoted" else []),
        ):
            with pytest.raises((CheckpointError, ModelError), match="lies outside of it"):
                read(folder)
    finally:
        out.unlink()
        put_back(folder, before)


@examples(20)
@given(data=st.data())
def test_changed_indices(spoil, data):
    folder = spoil("pivoted")
    before = contents(folder)
    headers = read_headers([folder / "model.safetensors"])
    some = {name: "model-00001-of-00001.safetensors" for name in list(headers)[:3]}
    index = {"metadata": {"total_size": 1}, "weight_map": some}
    try:
        path = folder / "model.safetensors"
        path.rename(folder / "model-00001-of-00001.safetensors")
        name = "model.safetensors.index.json"
        (folder / name).write_bytes(as_json(data.draw(mutated(index))))
        read_all(folder)
    finally:
        put_back(folder, before)


class Bomb:
    """Makes a file when it is read back from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["dense", "pivoted"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt"])
def test_pickles_are_never_read(spoil, kind, name):
    folder, before = spoil(kind), contents(spoil(kind))
    mark = folder.parent / "pwned"
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    try:
        assert read_all(folder) is not None  # beside good weights it is passed over
        (folder / "model.safetensors").unlink()
        for read in (slimrank.load, lambda path: load_model(parse_source(path))):
            with pytest.raises((CheckpointError, ModelError), match=r"pickled weights \(\.bin\)"):
                read(folder)
        assert not mark.exists()
    finally:
        put_back(folder, before)


@pytest.mark.parametrize("kind", ["dense", "pivoted"])
def test_code_of_a_folder_is_never_run(spoil, configs, kind, monkeypatch):
    folder, before = spoil(kind), contents(spoil(kind))
    mark = folder.parent / "pwned"

    def asked(*_):
        raise AssertionError("a user was asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto = {name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    changed = {**configs[kind], "auto_map": auto, "trust_remote_code": True, "model_type": "evil"}
    (folder / "config.json").write_bytes(as_json(changed))
    tokens = json.loads(before["tokenizer_config.json"])
    tokens |= {"auto_map": auto, "tokenizer_class": "Evil", "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_bytes(as_json(tokens))
    try:
        assert read_all(folder) is None
        right_or_refused(lambda: load_tokenizer(parse_source(folder)), folder)
        assert not mark.exists()
    finally:
        put_back(folder, before)
