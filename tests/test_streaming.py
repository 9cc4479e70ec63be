"""A streamed model gives what the same model in memory gives, and holds one block at a time."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XLMConfig, XLMWithLMHeadModel

from interrupted import CutOff, assert_same_folder, blocks_kept, stopping
from slimrank import blockwise, compress, load, profile
from slimrank.calibration import collect_moments, embed_batches, store
from slimrank.checkpoint import load_mapped, mapped_folder, state_folder
from slimrank.errors import CheckpointError, ModelError, RecipeError
from slimrank.model import block_path, copy_of, discover, is_mapped, turns
from slimrank.options import CompressionOptions
from slimrank.source import load_model, map_model, parse_source
from tiny.models import fill

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


SPILLED = {
    "uniform": {"method": "swift-svd", "allocation": "uniform"},
    "by a profile, two passes": {"passes": 2},
}


@pytest.fixture
def spilled(monkeypatch):
    """Paths of all activations that were written."""
    found, save = [], store.save_file

    def seen(tensors, path):
        found.append(path)
        save(tensors, path)

    monkeypatch.setattr(store, "save_file", seen)
    return found


@pytest.mark.parametrize("name", SPILLED)
def test_hidden_states_on_disk_change_nothing(
    name, spilled, make_folder, make_recipe, make_windows, tmp_path
):
    source, recipe = make_folder("qwen2"), make_recipe(0.6, **SPILLED[name])
    options = CompressionOptions(memory=0, batch_size=3, stream=True)
    for way, how in (("memory", replace(options, memory=None)), ("disk", options)):
        assert not spilled
        out = tmp_path / way / "small"
        out.parent.mkdir()
        compress(source, recipe, out=out, windows=make_windows(10), options=how)
        assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert len(spilled) >= 2 * 4  # each of four batches, in front of each block
    assert all(state_folder(out) in path.parents for path in spilled)
    assert_same_folder(out, tmp_path / "memory" / "small")


def test_hidden_states_of_a_profile_go_to_disk_too(
    spilled, make_folder, make_recipe, make_windows, tmp_path
):
    source, recipe = make_folder("llama"), make_recipe(method="swift-svd")
    for way, memory in (("memory", None), ("disk", 0)):
        assert not spilled
        options = CompressionOptions(memory=memory, batch_size=3)
        profile(source, recipe, tmp_path / way, windows=make_windows(10), options=options)
    assert len(spilled) >= 2 * 3
    assert all(state_folder(tmp_path / "disk") in path.parents for path in spilled)
    for file in sorted((tmp_path / "memory").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory"]


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


def test_a_part_is_let_go_of_once_however_many_batches_pass_it(
    monkeypatch, make_folder, make_windows
):
    model = load_mapped(make_folder("llama"))
    anatomy = discover(model, torch.arange(12)[None])
    batches = embed_batches(model, anatomy, make_windows(8), 2)
    let_go, gone = turns.let_go, []
    monkeypatch.setattr(turns, "let_go", lambda part: (gone.append(part), let_go(part)))
    blocks = list(model.model.layers)
    for index, block in enumerate(blocks):
        collect_moments(model, block, index, anatomy.groups[index], batches)
    assert len(batches) > 3
    assert [blocks.index(part) for part in gone] == [1, 0]  # the last one had passed its input on
    gone.clear()
    for _ in range(2):
        model(torch.arange(6)[None])
    parts = [model.model.embed_tokens, *blocks, model.lm_head]
    assert [parts.index(part) for part in gone] == [2, 0, 1, 2, 3, 0, 1, 2]


def test_a_copy_takes_turns_with_its_model_and_does_not_hold_it(monkeypatch, make_folder, probe):
    model = load_mapped(make_folder("llama"))
    other, gone = copy_of(model), []
    model(probe)
    monkeypatch.setattr(turns, "let_go", gone.append)
    other.model.embed_tokens(probe)
    assert gone == [model.lm_head]
    model.lm_head(torch.zeros(1, 32))
    gone.clear()
    last = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert last() is None
    other.model.embed_tokens(probe)
    assert not gone


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


def test_a_model_with_several_lists_of_blocks(tmp_path, probe):
    """Which of them a recipe means need not be known to leave them on disk."""
    config = XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, causal=True)
    with torch.random.fork_rng():
        whole = XLMWithLMHeadModel(config).eval()
    fill(whole)
    whole.save_pretrained(tmp_path)
    streamed = load_mapped(tmp_path)
    with pytest.raises(ModelError, match=r"has several lists of blocks"):
        block_path(streamed)
    with torch.no_grad():
        assert torch.equal(streamed(probe).logits, whole(probe).logits)


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
