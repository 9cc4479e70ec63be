"""Folders of packed factors: bytes as counted, the same function again, damage by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimrank
from slimrank.checkpoint import (
    LowRankConfig,
    align_folder,
    folder_bytes,
    read_folder,
    weight_file_bytes,
)
from slimrank.errors import CheckpointError, RecipeError
from slimrank.linalg import remapped_bytes
from slimrank.quantizing import quantize
from tiny.folders import edit_config, edit_weights, error_without_slimrank, logits_of

NAME = "model.layers.0.mlp.up_proj"
KEY = f"{NAME}.remapped"
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory, make_folder, make_recipe):
    """A compressed Llama of 16 bits, pivoted in part; not to be changed."""
    out = tmp_path_factory.mktemp("halves") / "llama"
    dense = make_folder("llama", dtype=BFLOAT16)
    slimrank.compress(dense, make_recipe(layout="auto", ignore=["o_proj"]), out=out)
    return out


@pytest.fixture(scope="session")
def remapped_folder(tmp_path_factory, half_folder):
    """The same, packed; not to be changed."""
    out = tmp_path_factory.mktemp("remapped") / "llama"
    quantize(half_folder, out, packing="remapped")
    return out


@pytest.fixture
def remapped(tmp_path, remapped_folder):
    """A copy of it to damage."""
    return Path(shutil.copytree(remapped_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("family", "dtype", "layout"),
    [
        ("qwen2_tied", BFLOAT16, "plain"),
        ("qwen2_tied", FLOAT16, "pivoted"),
        ("opt", BFLOAT16, "pivoted"),
        ("opt", FLOAT16, "plain"),
        ("falcon", BFLOAT16, "auto"),
    ],
)
def test_families_layouts_and_dtypes(family, dtype, layout, make_compressed, probe, tmp_path):
    model, _ = make_compressed(family, dtype=dtype, layout=layout)
    source, out, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    model.save_pretrained(source)
    report = quantize(source, out, packing="remapped")
    assert report.packing == "remapped"
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
    align_folder(again)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    ids = loaded.generate(probe[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[1] == 7


def test_the_bytes_are_those_that_remapped_bytes_counts(remapped_folder, half_folder):
    contents, before = read_folder(remapped_folder), read_folder(half_folder)
    (file,) = remapped_folder.glob("*.safetensors")
    tensors = load_file(file)
    sides = {"up_proj": (48, 32), "down_proj": (32, 48), "q_proj": (32, 32), "k_proj": (16, 32)}
    for linear in contents.quantization.linears:
        found = {k: t for k, t in tensors.items() if k.startswith(f"{linear.name}.")}
        assert found.keys() == {f"{linear.name}.weight"} | {
            f"{linear.name}.remapped.{part}" for part in ("packed", "latent_scale", "expand_scale")
        }
        stored = sum(tensor.nbytes for tensor in found.values())
        assert stored == linear.bytes_after
        role = linear.name.rsplit(".", 1)[1]
        if role in sides:
            assert stored == remapped_bytes(*sides[role], linear.rank)
    assert {linear.name.rsplit(".", 1)[1] for linear in contents.quantization.linears} > set(sides)
    losses = {linear.name: linear.measured_loss for linear in before.report.linears}
    assert all(x.truncation_loss == losses[x.name] for x in contents.quantization.linears)


def test_inspect_sees_what_is_there(remapped_folder, half_folder, count_params):
    contents, before = read_folder(remapped_folder), read_folder(half_folder)
    assert any(linear.pivoted for linear in before.report.linears)
    assert not any(linear.pivoted for linear in contents.report.linears)
    assert contents.report_fits
    assert set(contents.int8) == set(contents.ranks) == set(before.ranks)
    assert contents.ranks == before.ranks
    assert contents.size.weight_bytes == weight_file_bytes(remapped_folder)
    floats = slimrank.load(remapped_folder)
    plain = sum(
        linear.rank * (layer.in_features + layer.out_features)
        for linear in contents.report.linears
        if linear.rank is not None
        for layer in [floats.get_submodule(linear.name)]
    )
    shapes = [x for x in before.report.linears if x.rank is None]
    assert contents.size.target_params == plain + sum(x.params for x in shapes)
    assert contents.size.model_params == count_params(floats) + plain
    assert "memory of one dense matrix" in (remapped_folder / "README.md").read_text()
    assert (remapped_folder / "tokenizer.json").is_file()


def test_without_a_report_sizes_come_from_the_files(remapped, remapped_folder):
    (remapped / "report.json").unlink()
    size, reported = read_folder(remapped).size, read_folder(remapped_folder).size
    assert size.model_params == reported.model_params
    assert size.target_params == reported.target_params
    assert size.target_params_before == reported.target_params_before
    assert size.weight_bytes == reported.weight_bytes
    assert size.weight_bytes_before == reported.weight_bytes_before


def test_dense_linears_are_by_rows(half_folder, tmp_path, probe):
    report = quantize(half_folder, tmp_path / "b", packing="remapped", dense_linears=True)
    dense = {linear.name for linear in report.linears if linear.rank is None}
    assert dense == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    loaded = slimrank.load(tmp_path / "b")
    assert loaded.config.quantization_config.rounded.keys() == dense
    assert not loaded.hf_quantizer.is_trainable
    exact = logits_of(slimrank.load(half_folder, dtype="auto"), probe)
    found = logits_of(loaded, probe)
    assert (found - exact).norm() < 0.05 * exact.norm()
    floats = loaded.dequantize()
    assert not any(name.endswith("remapped") for name, _ in floats.named_modules())
    assert (logits_of(floats, probe) - found).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_cache_of_latents_stays_one(family, make_compressed, tmp_path, probe):
    model, _ = make_compressed(family, dtype=BFLOAT16, kv_cache={"keep": 0.5}, layout="auto")
    model.save_pretrained(tmp_path / "a")
    quantize(tmp_path / "a", tmp_path / "b", packing="remapped")
    loaded = slimrank.load(tmp_path / "b", dtype=torch.float32)  # where both ways agree to the end
    assert loaded.config.quantization_config.kv_cache.keys() == {
        f"model.layers.{i}.self_attn" for i in range(2)
    }
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = loaded.generate(probe[:, :6], **options)
    assert torch.equal(ids, loaded.generate(probe[:, :6], use_cache=False, **options))


def test_another_dtype_at_load_is_a_cast_of_what_is_unpacked(remapped_folder, probe, tmp_path):
    exact = logits_of(slimrank.load(remapped_folder, dtype="auto"), probe).float()
    for dtype in (torch.float32, FLOAT16):
        loaded = slimrank.load(remapped_folder, dtype=dtype)
        found = logits_of(loaded, probe)
        assert found.dtype == dtype
        assert (found.float() - exact).norm() < 0.05 * exact.norm()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(slimrank.load(tmp_path / "again"), probe), found)


def test_perplexity_before_and_after(half_folder, tmp_path):
    text = torch.randint(4, 90, (96,), generator=torch.Generator().manual_seed(0))
    options = {"packing": "remapped", "text": text, "sequence_length": 32}
    report = quantize(half_folder, tmp_path / "b", **options)
    loaded = slimrank.load(tmp_path / "b", dtype="auto")
    assert report.perplexity == slimrank.evaluation.perplexity(loaded, text, 32).value
    assert report.perplexity_before == pytest.approx(report.perplexity, rel=0.05)
    assert "8 bits, remapped" in report.line()


def test_what_reads_version_2_refuses_the_folder(remapped_folder):
    config = json.loads((remapped_folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    for version, what in ((1, "8 bits"), (2, "packed factors")):
        with pytest.raises(CheckpointError, match=f"version {version}, which has no {what}"):
            LowRankConfig(**config | {"format_version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, rf"{NAME}\.remapped\.dtype"),
        ({"dtype": "load_file"}, rf"{NAME}\.remapped\.dtype"),
        ({"out_features": 0}, rf"{NAME}\.remapped\.out_features"),
        ({"in_features": 32.0}, rf"{NAME}\.remapped\.in_features"),
        ({"in_features": 31}, f"{NAME} is 48 by 31, the model that it is 48 by 32"),
        ({"out_features": 10**9}, f"{NAME} is 1000000000"),
        ({"rows": 3}, rf"{NAME}\.remapped\.rows"),
    ],
)
def test_a_hostile_entry_does_not_load(remapped, change, message):
    edit_config(remapped, lambda c: c["linears"][NAME]["remapped"].update(change))
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(remapped)
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(remapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 33}, f"{NAME} rank 33, over 32"),
        ({"rank": 10**30}, f"{NAME} rank 1000000000"),
        ({"rank": 0}, rf"{NAME}\.rank"),
        ({"rank": 1}, rf"{NAME}\.remapped\.packed has shape"),
        ({"bits": 8}, f"{NAME}.*stands beside neither"),
        ({"pivoted": True}, f"{NAME}.*stands beside neither"),
        ({"remapped": None}, f"lack {NAME}"),
        ({"remapped": "bfloat16"}, rf"{NAME}\.remapped"),
    ],
)
def test_other_entries_that_do_not_fit(remapped, change, message):
    edit_config(remapped, lambda c: c["linears"][NAME].update(change))
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(remapped)


@pytest.mark.parametrize("change", [{"rank": 1}, {"out_features": 10**9}])
def test_read_folder_refuses_them_without_the_model(remapped, change):
    def edit(config):
        entry = config["linears"][NAME]
        (entry if "rank" in change else entry["remapped"]).update(change)

    edit_config(remapped, edit)
    with pytest.raises(CheckpointError, match=rf"{NAME}\.remapped\.packed has shape"):
        read_folder(remapped)


def rename(tensors):
    tensors[KEY.replace("layers.0", "layers.9") + ".packed"] = tensors[f"{KEY}.packed"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.packed"), rf"lack {NAME}\.remapped\.packed"),
        (lambda t: t.pop(f"{KEY}.latent_scale"), rf"lack {NAME}\.remapped\.latent_scale"),
        (lambda t: t.pop(f"{NAME}.weight"), rf"lack {NAME}\.weight"),
        (rename, r"does not list: model\.layers\.9"),
        (lambda t: t.update({f"{KEY}.expand_scale": torch.ones(1)}), r"has shape \(1,\)"),
        (lambda t: t.update({f"{KEY}.packed": t[f"{KEY}.packed"][:-1].clone()}), "has shape"),
        (
            lambda t: t.update({f"{KEY}.packed": t[f"{KEY}.packed"].int()}),
            r"packed is torch\.int32, not torch\.int16",
        ),
        (
            lambda t: t.update({f"{KEY}.packed": t[f"{KEY}.packed"].view(BFLOAT16)}),
            r"packed is torch\.bfloat16, not torch\.int16",
        ),
        (lambda t: t[f"{KEY}.latent_scale"].fill_(float("nan")), rf"{NAME}\.latent is not finite"),
        (lambda t: t[f"{KEY}.expand_scale"].fill_(-1.0), rf"{NAME}\.expand is not finite or neg"),
        (lambda t: t[f"{KEY}.packed"][40].fill_(0x7F80), f"{NAME} is not finite in row 40"),
    ],
)
def test_damaged_tensors_do_not_load(remapped, change, message):
    edit_weights(remapped, change)
    with pytest.raises(CheckpointError, match=message):
        slimrank.load(remapped)
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(remapped)


def test_without_slimrank_the_folder_does_not_load(remapped_folder):
    assert "mismatch" in error_without_slimrank(remapped_folder).lower()


def test_refusals(compressed_folder, remapped_folder, half_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=r"factors of model\.layers\.0.* are torch\.float32: com"):
        quantize(compressed_folder, out, packing="remapped")
    with pytest.raises(RecipeError, match="packing is 'columns'; it is one of rows, remapped"):
        quantize(half_folder, out, packing="columns")
    for packing in ("rows", "remapped"):
        with pytest.raises(CheckpointError, match="in 8 bits already"):
            quantize(remapped_folder, out, packing=packing)
    assert not list(tmp_path.iterdir())
