"""A streamed model gives what the same model in memory gives, and holds one block at a time."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from interrupted import CutOff, assert_same_folder, blocks_kept, stopping
from slimrank import blockwise, compress, load, profile
from slimrank.checkpoint import load_mapped, mapped_folder
from slimrank.errors import CheckpointError, ModelError, RecipeError
from slimrank.model import is_mapped
from slimrank.options import CompressionOptions
from slimrank.source import load_model, map_model, parse_source

STREAM = CompressionOptions(stream=True)
EXPERTS = ("mixtral", "qwen3_moe")  # their files hold experts one by one, the models all in one


def test_it_computes_what_the_model_in_memory_computes(family, make_folder, probe):
    folder = make_folder(family)
    if family in EXPERTS:
        with pytest.raises(CheckpointError, match=r"cannot be streamed.*is no weight of"):
            load_mapped(folder)
        return
    streamed, whole = map_model(parse_source(folder)), load_model(parse_source(folder))
    assert is_mapped(streamed)
    assert not is_mapped(whole)
    assert streamed.state_dict().keys() == whole.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(streamed(probe).logits, whole(probe).logits)
    assert streamed.generation_config == whole.generation_config
    assert streamed.config.to_dict() == whole.config.to_dict()


RECIPES = {
    "no text": {"method": "svd", "allocation": "uniform"},
    "uniform": {"method": "swift-svd", "allocation": "uniform", "layout": "plain"},
    "default": {},
    "two passes": {"passes": 2},
    "own sequences": {"generated_sequences": 2},
    "in sequence, refined": {"method": "aa-svd", "refine": {"preset": "fast", "epochs": 1}},
    "by predictions": {"method": "aa-svd", "refine": {"preset": "fast", "epochs": 1, "loss": "kl"}},
    "latents": {"kv_cache": {"keep": 0.5}},
    "dynamic": {"method": "swift-svd", "allocation": "swift"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_folder_comes_out(name, make_folder, make_recipe, make_windows, tmp_path):
    source = make_folder("qwen2")
    held_out = {"calibration": {"held_out_sequences": 2}}
    recipe = make_recipe(0.6, **RECIPES[name], **held_out)
    found = {}
    for way, options in (("whole", CompressionOptions()), ("streamed", STREAM)):
        report = compress(
            source, recipe, out=tmp_path / way, windows=make_windows(10), options=options
        )
        found[way] = load(tmp_path / way, dtype="auto").state_dict(), report
    (whole, report), (streamed, other) = found["whole"], found["streamed"]
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[key], streamed[key]) for key in whole)
    assert [x.rank for x in report.linears] == [x.rank for x in other.linears]
    assert report.size == other.size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["streamed", "whole"]


RANKS = {"allocation": "global", "global_ranks": {"unit": "relative"}}


@pytest.mark.parametrize("made", [{"method": "swift-svd"}, {"method": "svd", **RANKS}], ids=str)
def test_what_is_made_of_a_profile_is_the_same(
    made, make_folder, make_recipe, make_windows, tmp_path
):
    source, kept = make_folder("llama"), tmp_path / "profile"
    profile(source, make_recipe(method="swift-svd"), kept, windows=make_windows())
    recipe = make_recipe(0.5, **made)
    for way, options in (("whole", CompressionOptions()), ("streamed", STREAM)):
        compress(source, recipe, out=tmp_path / way, profile=kept, options=options)
    whole, streamed = (
        load(tmp_path / way, dtype="auto").state_dict() for way in ("whole", "streamed")
    )
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[key], streamed[key]) for key in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile", "streamed", "whole"]


def cut_short():
    return CompressionOptions(stream=True, track=stopping(1))


def test_what_looks_at_no_text_goes_on(make_folder, make_recipe, tmp_path):
    source, recipe = make_folder("llama"), make_recipe(0.5, method="svd", allocation="uniform")
    out, whole = tmp_path / "small", tmp_path / "whole" / "small"
    compress(source, recipe, out=whole)
    with pytest.raises(CutOff):
        compress(source, recipe, out=out, options=cut_short())
    assert blocks_kept(out) == 1
    compress(source, recipe, out=out, options=STREAM, resume=True)
    assert_same_folder(out, whole)


def test_what_is_made_of_a_profile_goes_on(make_folder, make_recipe, make_windows, tmp_path):
    source, out, whole = make_folder("llama"), tmp_path / "small", tmp_path / "whole" / "small"
    recipe = make_recipe(0.5, method="swift-svd")
    for name, seed in (("one", 0), ("other", 1)):
        text = make_windows(8, seed=seed)
        profile(source, recipe, tmp_path / name, windows=text)
    compress(source, recipe, out=whole, profile=tmp_path / "one")
    with pytest.raises(CutOff):
        compress(source, recipe, out=out, profile=tmp_path / "one", options=cut_short())
    again = {"out": out, "options": STREAM, "resume": True}
    with pytest.raises(CheckpointError, match="begun with another profile; give what"):
        compress(source, recipe, profile=tmp_path / "other", **again)
    compress(source, recipe, profile=tmp_path / "one", **again)
    assert_same_folder(out, whole)


def test_a_profile_is_the_same(make_folder, make_recipe, make_windows, tmp_path):
    source, recipe = make_folder("llama"), make_recipe(0.6)
    for way, options in (("whole", CompressionOptions()), ("streamed", STREAM)):
        profile(source, recipe, tmp_path / way, windows=make_windows(), options=options)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        one, other = load_file(file), load_file(tmp_path / "streamed" / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_finished_blocks_stay_on_disk(
    monkeypatch, make_folder, make_recipe, make_windows, tmp_path
):
    kept = []

    def seen(state, model, index, path, *arguments, **others):
        keep(state, model, index, path, *arguments, **others)
        block = model.get_submodule(path)
        kept.append(all(hasattr(p, "_pages") for p in block.parameters()))

    keep = blockwise.keep_block
    monkeypatch.setattr(blockwise, "keep_block", seen)
    recipe = make_recipe(0.5, method="swift-svd")
    compress(
        make_folder("llama"),
        recipe,
        out=tmp_path / "out",
        windows=make_windows(),
        options=STREAM,
    )
    assert kept == [True, True]


def test_a_compressed_folder_is_streamed_too(compressed_folder, probe):
    streamed, whole = load_mapped(compressed_folder), load(compressed_folder, dtype="auto")
    assert is_mapped(streamed)
    with torch.no_grad():
        assert torch.equal(streamed(probe).logits, whole(probe).logits)


def test_several_shards_are_written_and_read(
    monkeypatch, make_folder, make_recipe, tmp_path, make_windows
):
    monkeypatch.setattr(mapped_folder, "LEAST_SHARD", 1)
    monkeypatch.setattr(mapped_folder, "MOST_SHARD", 20_000)
    out = tmp_path / "out"
    compress(
        make_folder("llama"),
        make_recipe(0.5, method="swift-svd"),
        out=out,
        windows=make_windows(),
        options=STREAM,
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    load(out)


def test_damage_is_named(make_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_folder("llama"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"

    def saved(changed):
        save_file(changed, file, {"format": "pt"})
        return folder

    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_pr"
    ):
        load_mapped(saved({k: v for k, v in tensors.items() if k != lost}))
    with pytest.raises(CheckpointError, match=r"has shape"):
        load_mapped(saved({**tensors, lost: tensors[lost].mT.contiguous()}))
    with pytest.raises(CheckpointError, match=r"is stored in torch\.float64.*without --stream"):
        load_mapped(saved({**tensors, lost: tensors[lost].double()}))
    with pytest.raises(CheckpointError, match=r"extra is no weight of LlamaForCausalLM"):
        load_mapped(saved({**tensors, "extra": torch.ones(1)}))


def test_what_cannot_be_streamed_is_refused(make_folder, make_model, make_recipe, tmp_path):
    recipe, out = make_recipe(), tmp_path / "out"
    with pytest.raises(ModelError, match=r"a model in memory cannot be streamed"):
        compress(make_model("llama"), recipe, options=STREAM)
    with pytest.raises(ModelError, match=r"leave out --device cuda"):
        compress(
            make_folder("llama"),
            recipe,
            out=out,
            options=CompressionOptions(stream=True, device="cuda"),
        )
    with pytest.raises(RecipeError, match=r"holds the whole model"):
        compress(make_folder("llama"), make_recipe(tune={"epochs": 1}), out=out, options=STREAM)
    with pytest.raises(CheckpointError, match=r"is stored in torch\.float32"):
        compress(make_folder("llama"), make_recipe(dtype="bfloat16"), out=out, options=STREAM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["both, and not the same", "the head alone"])
def test_a_tied_model_is_tied_as_in_memory(make_folder, probe, tmp_path, stored):
    folder = tmp_path / "model"
    shutil.copytree(make_folder("qwen2_tied"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = 2 * embedding
    if stored == "the head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    streamed, whole = load_mapped(folder), load_model(parse_source(folder))
    with torch.no_grad():
        assert torch.equal(streamed(probe).logits, whole(probe).logits)
    ties = [m.lm_head.weight is m.model.embed_tokens.weight for m in (streamed, whole)]
    assert ties == [stored == "the head alone"] * 2


def test_tensors_that_transformers_passes_over_are_passed_over(make_folder, probe, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_folder("llama"), folder)
    file = folder / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    streamed, whole = load_mapped(folder), load_model(parse_source(folder))
    with torch.no_grad():
        assert torch.equal(streamed(probe).logits, whole(probe).logits)
