"""What is saved is what is loaded, to the bit; without slimrank it does not load at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import slimrank
from slimrank import LowRankLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def weights_in(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bitwise(family, make_compressed, probe, tmp_path, dtype):
    model, report = make_compressed(family, dtype=dtype)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    loaded = slimrank.load(first)
    assert_same_state(model, loaded)
    assert torch.equal(logits_of(model, probe), logits_of(loaded, probe))
    plain = AutoModelForCausalLM.from_pretrained(first)
    assert_same_state(model, plain)
    assert not plain.training
    loaded.save_pretrained(second)
    before, after = weights_in(first), weights_in(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (second / "config.json").read_text()
    )
    assert_same_state(model, slimrank.load(second))
    ranks = {x.name: x.rank for x in report.linears if x.rank is not None}
    assert ranks
    found = {n: m.rank for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)}
    assert found == ranks


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "mixtral", "falcon"])
def test_shards(family, make_compressed, probe, tmp_path):
    model, _ = make_compressed(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(model, slimrank.load(tmp_path))
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_no_dense_weight_of_a_factorised_linear_is_allocated(
    make_compressed, tmp_path, monkeypatch
):
    model, report = make_compressed("llama")
    assert all(x.rank is not None for x in report.linears)
    model.save_pretrained(tmp_path)
    dense = {
        (m.out_features, m.in_features) for m in model.modules() if isinstance(m, LowRankLinear)
    }
    made = []
    original = nn.Linear.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append((tuple(self.weight.shape), self.weight.device.type))

    monkeypatch.setattr(nn.Linear, "__init__", spy)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                seen.append(tuple(result.shape))
            return result

    with Watch():
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {device for _, device in made} == {"meta"}
    assert not dense & set(seen)


SCRIPT = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([{ids}])
with torch.no_grad():
    logits = model(input_ids=ids).logits
torch.set_printoptions(precision=9)
from safetensors.torch import save_file
save_file({{"logits": logits}}, sys.argv[2])
"""


def in_subprocess(folder, out, imports, ids):
    script = SCRIPT.format(imports=imports, ids=ids)
    source = Path(slimrank.__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    return subprocess.run(
        [sys.executable, "-c", script, str(folder), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_without_slimrank_the_folder_does_not_load(compressed_folder, tmp_path):
    out = tmp_path / "logits.safetensors"
    done = in_subprocess(compressed_folder, out, "", [4, 5, 6])
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "size mismatch" in done.stderr.lower() or "mismatched" in done.stderr.lower()
    assert not out.exists()


def test_with_slimrank_it_gives_the_same_logits(compressed_folder, tmp_path):
    ids = [4, 5, 6, 7, 20, 30, 31]
    out = tmp_path / "logits.safetensors"
    done = in_subprocess(compressed_folder, out, "import slimrank", ids)
    assert done.returncode == 0, done.stderr
    expected = logits_of(slimrank.load(compressed_folder), torch.tensor([ids]))
    torch.testing.assert_close(load_file(out)["logits"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "gemma3"])
def test_the_backbone_loads_without_its_head(family, make_compressed, probe, tmp_path):
    model, report = make_compressed(family)
    model.save_pretrained(tmp_path / "whole")
    backbone = AutoModel.from_pretrained(tmp_path / "whole")
    count = sum(isinstance(m, LowRankLinear) for m in backbone.modules())
    assert count == len(report.linears)
    with torch.no_grad():
        expected = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        found = backbone(input_ids=probe, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)
    backbone.save_pretrained(tmp_path / "backbone")
    assert_same_state(backbone, AutoModel.from_pretrained(tmp_path / "backbone"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_in_another_dtype(compressed_folder, probe, dtype):
    model = slimrank.load(compressed_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert torch.isfinite(logits_of(model, probe)).all()


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma2", "opt", "falcon"])
def test_tied_embeddings_stay_tied(family, make_compressed, tmp_path):
    model, _ = make_compressed(family)
    model.save_pretrained(tmp_path)
    for each in (model, slimrank.load(tmp_path)):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert not [name for name in weights_in(tmp_path) if "lm_head" in name]


def test_importing_and_registering_again_is_harmless():
    from slimrank.checkpoint import register

    register()
    register()


def test_a_dense_folder_loads_too(dense_folder, make_model):
    assert_same_state(slimrank.load(dense_folder), make_model("llama"))
