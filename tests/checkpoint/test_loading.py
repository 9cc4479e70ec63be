"""What a caller says to `load` switches off no more of its checks than it must."""

import json
import shutil

import pytest

import slimrank
from slimrank.errors import CheckpointError

FILE = "model.safetensors"


@pytest.fixture
def dense(dense_folder, tmp_path):
    return shutil.copytree(dense_folder, tmp_path / "dense")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "asked",
    [
        {"trust_remote_code": False},
        {"trust_remote_code": True},
        {"use_safetensors": True},
        {"subfolder": "", "variant": None, "gguf_file": None, "config": None},
    ],
    ids=str,
)
def test_links_and_sizes_always_count(dense, asked):
    assert slimrank.load(dense, **asked).config.num_hidden_layers == 2
    change(dense, num_hidden_layers=250)
    with pytest.raises(CheckpointError, match=r"describes .* parameters, the weight files hold"):
        slimrank.load(dense, **asked)
    change(dense, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="says num_hidden_layers"):
        slimrank.load(dense, **asked)
    (dense / FILE).rename(dense.parent / FILE)
    index = {"weight_map": {"a": f"../{FILE}"}}
    (dense / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lies outside of it"):
        slimrank.load(dense, **asked)


@pytest.mark.parametrize(
    "asked", [{"use_safetensors": False}, {"use_safetensors": None}, {"subfolder": "in"}], ids=str
)
def test_other_files_are_not_held_against_those_of_the_folder(dense, asked, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("looked at")

    monkeypatch.setattr("slimrank.checkpoint.loading.require_sound", refuse)
    if "subfolder" in asked:
        shutil.copytree(dense, dense / "in")
    if asked.get("use_safetensors", True) is False:
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            slimrank.load(dense, **asked)
    else:
        assert slimrank.load(dense, **asked).config.num_hidden_layers == 2


def test_code_that_is_trusted_is_run(dense):
    """Of a class that transformers lacks, only layers are counted."""
    auto = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
    (dense / "ours.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OurConfig(LlamaConfig):\n    model_type = 'ours'\n"
        "class OurModel(LlamaForCausalLM):\n    config_class = OurConfig\n"
    )
    change(dense, model_type="ours", auto_map=auto)
    with pytest.raises(CheckpointError, match="custom code"):
        slimrank.load(dense)
    assert type(slimrank.load(dense, trust_remote_code=True)).__name__ == "OurModel"
    change(dense, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="says num_hidden_layers"):
        slimrank.load(dense, trust_remote_code=True)
