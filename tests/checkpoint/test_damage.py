"""Every kind of damage is an error; none is a model with random weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimrank
from slimrank.checkpoint import read_folder
from slimrank.errors import CheckpointError, SlimrankError

UP = "model.layers.1.mlp.up_proj"
FILE = "model.safetensors"


def change(folder, edit):
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def missing_latent(tensors):
    del tensors[f"{UP}.latent.weight"]


def missing_expand(tensors):
    del tensors[f"{UP}.expand.weight"]


def missing_sentinel(tensors):
    del tensors[f"{UP}.weight"]


def missing_both(tensors):
    missing_latent(tensors)
    missing_expand(tensors)


def unexpected_factor(tensors):
    tensors["model.layers.1.mlp.act_fn.latent.weight"] = torch.zeros(2, 2)


def narrow_latent(tensors):
    tensors[f"{UP}.latent.weight"] = tensors[f"{UP}.latent.weight"][:-1].contiguous()


def transposed_expand(tensors):
    tensors[f"{UP}.expand.weight"] = tensors[f"{UP}.expand.weight"].mT.contiguous()


def filled_sentinel(tensors):
    tensors[f"{UP}.weight"] = torch.zeros(48, 32)


FACTORS = [
    missing_latent,
    missing_expand,
    missing_both,
    missing_sentinel,
    unexpected_factor,
    narrow_latent,
    transposed_expand,
    filled_sentinel,
]


@pytest.mark.parametrize("edit", FACTORS)
def test_damaged_factors_do_not_load_either_way(copied, edit):
    change(copied, edit)
    with pytest.raises(CheckpointError, match="mlp"):
        slimrank.load(copied)
    with pytest.raises(SlimrankError, match="mlp"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_any_other_missing_tensor_is_an_error_of_load(copied, name):
    change(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"missing keys: {name}"):
        slimrank.load(copied)


def test_any_other_unexpected_tensor_is_an_error_of_load(copied):
    change(copied, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"unexpected keys: model\.extra\.weight"):
        slimrank.load(copied)


def test_any_other_shape_is_an_error(copied):
    change(copied, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(31,\)"):
        slimrank.load(copied)


def test_a_factorised_linear_that_is_dense_in_the_file(copied):
    def densify(tensors):
        tensors[f"{UP}.weight"] = tensors.pop(f"{UP}.expand.weight") @ tensors.pop(
            f"{UP}.latent.weight"
        )

    change(copied, densify)
    with pytest.raises(CheckpointError, match=r"mlp.up_proj"):
        slimrank.load(copied)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def long_header(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 0x40
    path.write_bytes(bytes(content))


def damaged_header(path):
    content = bytearray(path.read_bytes())
    content[9] ^= 0x55
    path.write_bytes(bytes(content))


def gone(path):
    path.unlink()


def one_byte_short(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = [truncate, empty, long_header, damaged_header, one_byte_short, gone]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_does_not_load_either_way(copied, damage):
    damage(copied / FILE)
    with pytest.raises(CheckpointError):
        slimrank.load(copied)
    with pytest.raises(Exception, match=r"."):
        AutoModelForCausalLM.from_pretrained(copied)
    with pytest.raises(CheckpointError):
        read_folder(copied)


@pytest.mark.parametrize("damage", [truncate, damaged_header, gone])
def test_a_damaged_shard_does_not_load_either_way(copied, damage):
    slimrank.load(copied).save_pretrained(copied / "sharded", max_shard_size="30KB")
    shard = sorted((copied / "sharded").glob("model-0000*.safetensors"))[1]
    damage(shard)
    with pytest.raises(CheckpointError):
        slimrank.load(copied / "sharded")
    with pytest.raises(Exception, match=r"."):
        AutoModelForCausalLM.from_pretrained(copied / "sharded")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\xff"])
def test_a_damaged_config_is_an_error(copied, text):
    (copied / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        slimrank.load(copied)
    with pytest.raises(CheckpointError):
        read_folder(copied)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot load .*nothing"):
        slimrank.load(tmp_path / "nothing")


def test_a_list_that_lacks_one_factorised_linear_is_an_error(copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["linears"][UP]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"factors that config.json does not list"):
        slimrank.load(copied)


def test_pickled_weights_are_not_read(copied):
    """A .bin file beside nothing else is refused before it is opened."""
    (copied / FILE).unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError):
        slimrank.load(copied)
