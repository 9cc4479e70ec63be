"""The file that folders carry gives what slimrank gives, where slimrank cannot be imported.

All folders are loaded in one process of their own, which takes seconds to start.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimrank
from slimrank import quantize
from slimrank.checkpoint import add_remote_code, modeling_low_rank
from slimrank.nn import LowRankLinear
from tiny.folders import edit_config, edit_weights, logits_of
from tiny.models import FAMILIES

NOISE = "ignore:.*fused tensors:slimrank.errors.CoverageWarning"
LAYOUTS = {"plain": {"layout": "plain", "ignore": ["*.0.*"]}, "pivoted": {"layout": "pivoted"}}
NORM = "model.norm.weight"
CASES = [("llama", "plain"), *zip(FAMILIES, cycle(("pivoted", "plain")), strict=False)]
FIRST = "model.layers.0.self_attn.o_proj"


def without(name):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


def with_tensor(name, tensor):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: tensor}))


def changed(name, change):
    return lambda folder: edit_weights(folder, lambda tensors: change(tensors[name]))


def with_config(**values):
    return lambda folder: edit_config(folder, lambda config: config.update(values))


def renamed(folder):
    def change(config):
        config["linears"]["model.norm"] = config["linears"].pop(FIRST)

    edit_config(folder, change)


DAMAGE = {
    "factor": (without(f"{FIRST}.latent.weight"), f"missing_keys: {FIRST}.latent.weight"),
    "norm": (without(NORM), f"missing_keys: {NORM}"),
    "stray": (with_tensor("stray", torch.ones(1)), "unexpected_keys: stray"),
    "shape": (with_tensor(NORM, torch.ones(1)), "ignore_mismatched_sizes|is of shape"),
    "twice": (
        changed(f"{FIRST}.pivots", lambda pivots: pivots[:2].fill_(0)),
        f"{FIRST}.pivots are damaged",
    ),
    "outside": (
        changed(f"{FIRST}.pivots", lambda pivots: pivots[0].fill_(32)),
        f"{FIRST}.pivots are damaged",
    ),
    "newer": (with_config(format_version=3), "format version 3 in config.json needs slimrank"),
    "splits": (with_config(splits={}), "splits in config.json needs slimrank"),
    "name": (renamed, "config.json lists model.norm, which is no linear of the model"),
}
INT8_DAMAGE = {
    "scale": (
        changed(f"{FIRST}.latent.scale", lambda scale: scale[0].fill_(torch.nan)),
        f"{FIRST}.latent.codes or {FIRST}.latent.scale are damaged",
    ),
    "bits": (
        with_config(rounded={"model.layers.0.mlp.up_proj": {"bits": 4}}),
        "4 bits; this file knows 8",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory, make_compressed, windows):
    """What slimrank and the file say of each folder."""
    root = tmp_path_factory.mktemp("code")
    ids = torch.stack(windows.windows[:2])
    jobs, expected = [], {}

    def job(name, folder, again=False, **settings):
        jobs.append({"name": name, "folder": str(folder), "settings": settings, "again": again})

    def expect(name, folder, dtype="auto"):
        model, start = slimrank.load(folder, dtype=dtype), ids[:, :5]
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        expected[name] = {"logits": logits_of(model, ids), "written": written}

    def made(name, family, shard="50GB", dtype=torch.float32, **recipe):
        model, _ = make_compressed(family, dtype=dtype, **recipe)
        model.save_pretrained(root / name, max_shard_size=shard)
        add_remote_code(model, root / name)
        expect(name, root / name)
        return root / name

    def damaged(source, name, change):
        change(shutil.copytree(source, root / name))
        job(name, root / name)

    for family, layout in CASES:
        name = f"{family}-{layout}"
        job(name, made(name, family, **LAYOUTS[layout]), again=True)
    llama = root / "llama-pivoted"
    job("shards", made("shards", "qwen2_tied", "20KB"), again=True)
    job("half", made("half", "qwen2", dtype=torch.bfloat16, layout="pivoted"), dtype="auto")
    expect("cast", llama, "bfloat16")
    job("cast", llama, dtype="bfloat16")
    expected["mapped"] = expected["llama-pivoted"]
    job("mapped", llama, device_map="auto")
    job("cached", made("cached", "llama", kv_cache={"keep": 0.5}))
    rounded = {"bits": 8, "dense_linears": True}
    source = made("before", "llama", layout="pivoted", ignore=["up_proj"])
    quantize(source, root / "int8", **rounded)
    expect("int8", root / "int8")
    job("int8", root / "int8", again=True)
    expect("float16", root / "int8", "float16")
    job("float16", root / "int8", dtype="float16")
    for name, (change, _) in DAMAGE.items():
        damaged(llama, name, change)
    for name, (change, _) in INT8_DAMAGE.items():
        damaged(root / "int8", name, change)
    job("untrusted", llama, trust_remote_code=False)
    save_file({"ids": ids}, root / "ids.safetensors")
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("without_slimrank.py")
    done = subprocess.run(
        [sys.executable, script, root / "jobs.json", root],
        env=os.environ | {"HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for key, tensor in load_file(root / "told.safetensors").items():
        name, _, what = key.rpartition(".")
        found.setdefault(name, {})[what] = tensor
    errors = json.loads((root / "errors.json").read_text())
    return SimpleNamespace(root=root, expected=expected, found=found, errors=errors)


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_all_families_say_the_same_and_are_saved_with_the_file(family, layout, told):
    name = f"{family}-{layout}"
    assert name not in told.errors, told.errors[name]
    expected, found = told.expected[name], told.found[name]
    assert torch.equal(found["written"], expected["written"])
    for what in ("logits", "copied", "again"):
        assert torch.equal(found[what], expected["logits"]), what
    again = slimrank.load(told.root / name)  # what it wrote, in its own place
    assert any(isinstance(module, LowRankLinear) for module in again.modules())


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize("name", ["shards", "half", "cast", "mapped", "int8", "float16"])
def test_shards_dtypes_devices_and_eight_bits(name, told):
    assert name not in told.errors, told.errors[name]
    expected, found = told.expected[name], told.found[name]
    assert found["logits"].dtype == expected["logits"].dtype
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["written"], expected["written"])
    if "again" in found:
        assert torch.equal(found["again"], expected["logits"])


@pytest.mark.filterwarnings(NOISE)
def test_a_cache_of_latents_becomes_an_ordinary_one(told):
    assert "cached" not in told.errors, told.errors["cached"]
    assert torch.equal(told.found["cached"]["logits"], told.expected["cached"]["logits"])
    assert torch.equal(told.found["cached"]["written"], told.expected["cached"]["written"])


@pytest.mark.filterwarnings(NOISE)
@pytest.mark.parametrize("name", [*DAMAGE, *INT8_DAMAGE])
def test_what_is_damaged_is_refused_by_name(name, told):
    message = (DAMAGE | INT8_DAMAGE)[name][1]
    assert re.search(message, told.errors.get(name, "nothing was wrong"))


@pytest.mark.filterwarnings(NOISE)
def test_without_trust_it_stops_as_ever(told):
    assert "ignore_mismatched_sizes" in told.errors.get("untrusted", "nothing was wrong")


def test_shapes_are_compared_where_transformers_does_not(make_skeleton):
    config = modeling_low_rank.LowRankConfig({FIRST: {"rank": 4}})
    quantizer, model = modeling_low_rank.LowRankQuantizer(config), make_skeleton("llama")
    quantizer._process_model_before_weight_loading(model)
    assert quantizer._process_model_after_weight_loading(model) is model
    model.model.norm.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of shape \[1\], not \[32\]"):
        quantizer._process_model_after_weight_loading(model)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_slimrank(pivoted, bias):
    ours = LowRankLinear(8, 6, 3, bias=bias, dtype=torch.float64, pivoted=pivoted)
    if pivoted:
        ours.pivots = torch.tensor([4, 0, 3], dtype=torch.int32)
    theirs = modeling_low_rank.LowRankLinear(nn.Linear(8, 6, bias, dtype=torch.float64), 3, pivoted)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    inputs = torch.arange(40, dtype=torch.float64).reshape(5, 8).cos()
    outputs = ours(inputs), theirs(inputs)
    assert torch.equal(*outputs)
    found = [
        torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        for out, layer in zip(outputs, (ours, theirs), strict=True)
    ]
    names = [[name for name, _ in layer.named_parameters()] for layer in (ours, theirs)]
    other = dict(zip(names[1], found[1], strict=True))
    for name, gradient in zip(names[0], found[0], strict=True):
        torch.testing.assert_close(other[name], gradient)
