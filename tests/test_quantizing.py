"""Folders in eight bits: true bytes, the same function again, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank
from slimrank.checkpoint import (
    LowRankConfig,
    folder_bytes,
    mark_compressed,
    read_folder,
    weight_file_bytes,
)
from slimrank.errors import CheckpointError, NumericalError, RecipeError
from slimrank.nn import Int8Linear
from slimrank.quantizing import quantize
from tiny.folders import edit_config, edit_weights, error_without_slimrank, logits_of

NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory, compressed_folder):
    """The compressed Llama in eight bits; not to be changed."""
    out = tmp_path_factory.mktemp("quantized") / "llama"
    quantize(compressed_folder, out)
    return out


@pytest.fixture
def quantized(tmp_path, quantized_folder):
    """A copy of it to damage."""
    return Path(shutil.copytree(quantized_folder, tmp_path / "copy"))


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2_tied", "opt", "falcon"])
def test_families_layouts_and_dtypes(family, dtype, layout, make_compressed, probe, tmp_path):
    model, _ = make_compressed(family, dtype=dtype, layout=layout)
    source, out, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    model.save_pretrained(source)
    report = quantize(source, out)
    assert report.weight_bytes == weight_file_bytes(out) < weight_file_bytes(source)
    assert all(0 < linear.rounding_loss < 1e-3 for linear in report.linears)
    loaded = slimrank.load(out)
    assert folder_bytes(loaded, aligned=True) == report.weight_bytes
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(plain, probe), logits_of(loaded, probe))
    exact = logits_of(model, probe).double()
    off = (logits_of(loaded, probe).double() - exact).norm() / exact.norm()
    assert 0 < off < 0.05
    plain.save_pretrained(again)
    assert torch.equal(logits_of(slimrank.load(again), probe), logits_of(loaded, probe))
    assert (again / "config.json").read_text() == (out / "config.json").read_text()
    ids = loaded.generate(probe[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[1] == 7


def test_the_bytes_are_those_of_codes_and_scales(quantized_folder, compressed_folder):
    report = read_folder(quantized_folder).quantization
    entry = next(linear for linear in report.linears if linear.name == NAME)
    pivoted = read_folder(compressed_folder).report.linears
    assert next(x.pivoted for x in pivoted if x.name == NAME)
    rank, rows, in_features = entry.rank, 48 - entry.rank, 32
    assert entry.bytes_before == 4 * rank * (rows + in_features)
    assert entry.bytes_after == rank * (rows + in_features) + 4 * (rank + rows)
    assert entry.truncation_loss == next(
        x.measured_loss for x in read_folder(compressed_folder).report.linears if x.name == NAME
    )


def test_inspect_sees_what_is_there(quantized_folder, compressed_folder):
    contents, before = read_folder(quantized_folder), read_folder(compressed_folder)
    assert set(contents.int8) == set(contents.ranks) == set(before.ranks)
    assert contents.report_fits
    assert contents.size.weight_bytes == weight_file_bytes(quantized_folder)
    assert contents.size.target_params == before.size.target_params
    assert "rounded to 8 bits" in (quantized_folder / "README.md").read_text()
    assert (quantized_folder / "tokenizer.json").is_file()
    assert before.int8 == ()
    assert before.quantization is None


def test_without_a_report_sizes_come_from_the_files(quantized, compressed_folder):
    (quantized / "report.json").unlink()
    size, before = read_folder(quantized).size, read_folder(compressed_folder).size
    assert size.target_params == before.target_params
    assert size.target_params_before == before.target_params_before
    assert size.weight_bytes == weight_file_bytes(quantized) < before.weight_bytes


def test_dense_linears_on_request(make_compressed, tmp_path, probe):
    model, _ = make_compressed("qwen2", ignore=["down_proj", "q_proj"])
    model.save_pretrained(tmp_path / "a")
    only = quantize(tmp_path / "a", tmp_path / "b")
    report = quantize(tmp_path / "a", tmp_path / "c", dense_linears=True)
    dense = {linear.name for linear in report.linears if linear.rank is None}
    assert len(dense) == 4
    assert {name.rsplit(".", 1)[1] for name in dense} == {"down_proj", "q_proj"}
    assert report.weight_bytes < only.weight_bytes
    loaded = slimrank.load(tmp_path / "c")
    found = {n for n, m in loaded.named_modules() if isinstance(m, Int8Linear)}
    assert found == dense
    exact = logits_of(model, probe)
    assert (logits_of(loaded, probe) - exact).norm() < 0.05 * exact.norm()
    assert loaded.model.layers[0].self_attn.q_proj.bias is not None
    floats = loaded.dequantize()
    assert not any(isinstance(m, Int8Linear) for m in floats.modules())
    assert (logits_of(floats, probe) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_cache_of_latents_stays_one(family, make_compressed, tmp_path, probe):
    model, _ = make_compressed(family, kv_cache={"keep": 0.5}, ignore=["o_proj", "down_proj"])
    model.save_pretrained(tmp_path / "a")
    quantize(tmp_path / "a", tmp_path / "b", dense_linears=True)
    loaded = slimrank.load(tmp_path / "b")
    assert loaded.config.quantization_config.kv_cache.keys() == {
        f"model.layers.{i}.self_attn" for i in range(2)
    }
    ids = loaded.generate(probe[:, :6], max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = loaded.generate(
        probe[:, :6], max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(ids, plain)


def test_perplexity_before_and_after(compressed_folder, tmp_path):
    text = torch.randint(4, 90, (96,), generator=torch.Generator().manual_seed(0))
    report = quantize(compressed_folder, tmp_path / "b", text=text, sequence_length=32)
    expected = slimrank.evaluation.perplexity(slimrank.load(tmp_path / "b"), text, 32)
    assert report.perplexity == expected.value
    assert report.perplexity_tokens == expected.tokens
    assert report.perplexity_before == pytest.approx(report.perplexity, rel=0.05)
    assert report.perplexity_before != report.perplexity


def test_what_reads_version_1_refuses_the_folder(quantized_folder, compressed_folder):
    def config(folder):
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    assert config(quantized_folder)["format_version"] == 2
    assert config(quantized_folder)["linears"][NAME]["bits"] == 8
    assert config(compressed_folder)["format_version"] == 1
    with pytest.raises(CheckpointError, match="version 1, which has no 8 bits"):
        LowRankConfig(**config(quantized_folder) | {"format_version": 1})


@pytest.mark.parametrize("bits", [4, 8.0, "8", True, 16])
def test_other_bits_are_refused_by_the_reader(quantized, bits):
    edit_config(quantized, lambda c: c["linears"][NAME].update(bits=bits))
    with pytest.raises(CheckpointError, match=rf"{NAME}\.bits"):
        slimrank.load(quantized)


def test_bits_only_in_the_config_or_only_in_the_file(quantized):
    edit_config(quantized, lambda c: c["linears"][NAME].pop("bits"))
    with pytest.raises(CheckpointError, match=f"lack {NAME}"):
        slimrank.load(quantized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{NAME}.latent.scale"].fill_(float("nan")), "not finite or negative"),
        (lambda t: t[f"{NAME}.expand.scale"].fill_(-1.0), "not finite or negative"),
        (
            lambda t: t.update({f"{NAME}.latent.scale": torch.ones(1)}),
            r"latent\.scale has shape \(1,\)",
        ),
        (lambda t: t.pop(f"{NAME}.latent.scale"), "lack"),
        (
            lambda t: t.update({f"{NAME}.expand.codes": t[f"{NAME}.expand.codes"].float()}),
            r"expand\.codes is torch\.float32",
        ),
    ],
)
def test_hostile_tensors_do_not_load(quantized, change, message):
    edit_weights(quantized, change)
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(quantized)
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(quantized)


def test_without_slimrank_the_folder_does_not_load(quantized_folder):
    assert "mismatch" in error_without_slimrank(quantized_folder).lower()


def test_refusals(compressed_folder, quantized_folder, dense_folder, make_compressed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="bits is 4"):
        quantize(compressed_folder, out, bits=4)
    with pytest.raises(CheckpointError, match="not compressed by slimrank"):
        quantize(dense_folder, out)
    with pytest.raises(CheckpointError, match="in 8 bits already"):
        quantize(quantized_folder, out)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(compressed_folder, compressed_folder)
    with pytest.raises(CheckpointError, match="no model folder"):
        quantize(tmp_path / "nowhere", out)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(compressed_folder, tmp_path):
    folder = Path(shutil.copytree(compressed_folder, tmp_path / "a"))
    edit_weights(folder, lambda t: t[f"{NAME}.latent.weight"].fill_(float("nan")))
    with pytest.raises(NumericalError, match="NaN"):
        quantize(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_full_disk_leaves_nothing(compressed_folder, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimrank.checkpoint.other_files.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        quantize(compressed_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int8_is_not_trained(quantized_folder):
    model = slimrank.load(quantized_folder)
    assert not model.hf_quantizer.is_trainable
    again = slimrank.load(quantized_folder)
    mark_compressed(again)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_a_link_out_of_the_folder_is_not_copied(compressed_folder, tmp_path):
    """What it names would be in the folder that a user passes on."""
    folder = Path(shutil.copytree(compressed_folder, tmp_path / "copy"))
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"names notes\.txt, which lies outside of it"):
        quantize(folder, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
