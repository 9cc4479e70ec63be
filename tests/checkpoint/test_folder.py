"""A folder appears whole or not at all; what it holds is told from its headers."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

import slimrank
from slimrank.checkpoint import (
    folder,
    read_folder,
    read_report,
    state_folder,
    weight_file_bytes,
)
from slimrank.errors import CheckpointError, NumericalWarning
from tiny import models as TINY

FILES = {
    "config.json",
    "model.safetensors",
    "recipe.yaml",
    "report.json",
    "README.md",
    "tokenizer.json",
}


def test_what_is_in_a_folder(compressed_folder):
    assert {p.name for p in compressed_folder.iterdir()} >= FILES
    assert not [p for p in compressed_folder.parent.iterdir() if p != compressed_folder]
    assert compressed_folder.stat().st_mode & 0o777 == 0o755
    report = read_report(compressed_folder)
    assert report.size.weight_bytes == weight_file_bytes(compressed_folder)
    card = (compressed_folder / "README.md").read_text()
    assert report.size.line() in card


def test_read_folder_with_its_report(compressed_folder):
    contents = read_folder(compressed_folder)
    report = read_report(compressed_folder)
    assert contents.report_fits
    assert contents.report == report
    assert contents.size == report.size
    assert contents.ranks == {x.name: x.rank for x in report.linears}


def test_read_folder_without_a_report_says_the_same(copied):
    expected = read_folder(copied).size
    (copied / "report.json").unlink()
    contents = read_folder(copied)
    assert contents.report is None
    assert not contents.report_fits
    assert contents.size == expected


@pytest.mark.parametrize("family", ["qwen2_tied", "opt", "falcon", "phi3"])
def test_the_same_for_other_families(family, make_folder, make_recipe, tmp_path):
    out = tmp_path / "out"
    report = slimrank.compress(make_folder(family), make_recipe(), out=out)
    (out / "report.json").unlink()
    assert read_folder(out).size == report.size


def test_read_folder_with_a_report_of_other_ranks(copied):
    path = copied / "report.json"
    values = json.loads(path.read_text())
    values["linears"][0]["rank"] += 1
    path.write_text(json.dumps(values))
    contents = read_folder(copied)
    assert contents.report is not None
    assert not contents.report_fits


def test_read_folder_with_other_weights_than_its_report(copied):
    model = slimrank.load(copied).half()
    model.save_pretrained(copied)
    contents = read_folder(copied)
    assert not contents.report_fits
    assert contents.size.weight_bytes == weight_file_bytes(copied)
    assert contents.size.target_params == read_report(copied).size.target_params


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 1}', "not json"])
def test_a_damaged_report_is_an_error(copied, text):
    (copied / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        read_folder(copied)


def test_a_dense_folder_is_refused(dense_folder):
    with pytest.raises(CheckpointError, match="not compressed by slimrank"):
        read_folder(dense_folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_folder(tmp_path)


def test_a_folder_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_folder(copied)


def fail_with(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


FAILURES = [
    OSError(28, "No space left on device"),
    SafetensorError("I/O error"),
    CheckpointError("differs"),
    RuntimeError("shared tensors"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["save", "compare", "card"])
def test_nothing_is_left_behind(
    make_model, make_recipe, windows, tmp_path, monkeypatch, error, where
):
    model = make_model("llama")
    if where == "save":
        monkeypatch.setattr(type(model), "save_pretrained", fail_with(error))
    elif where == "compare":
        monkeypatch.setattr(folder, "load", fail_with(error))
    else:
        monkeypatch.setattr(folder, "model_card", fail_with(error))
    expected = CheckpointError if isinstance(error, (OSError, SafetensorError)) else type(error)
    with pytest.raises(expected):
        slimrank.compress(model, make_recipe(method="svd"), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    said = "what is finished is kept" if isinstance(error, (OSError, SafetensorError)) else None
    with pytest.raises(expected, match=said):
        slimrank.compress(make_model("llama"), make_recipe(), out=tmp_path / "out", windows=windows)
    assert blocks_alone(tmp_path)


def blocks_alone(parent):
    """Whether there are the finished blocks of a run to ``out``, and nothing beside them."""
    kept = {path.name for path in state_folder(parent / "out").iterdir()}
    blocks = {f"block-{i:04d}.{end}" for i in (0, 1) for end in ("json", "safetensors")}
    return kept == {"run.json", "lock", *blocks} and len(list(parent.iterdir())) == 1


def flip_a_weight(again):
    again.model.layers[0].mlp.up_proj.latent.weight.data[0, 0] += 1


def drop_a_tensor(again):
    again.model.layers[0].mlp.up_proj.weight = None


def change_a_dtype(again):
    again.model.norm.half()


def change_the_config(again):
    again.config.rms_norm_eps *= 10
    again.model.norm.variance_epsilon *= 10


@pytest.mark.parametrize(
    "change", [flip_a_weight, drop_a_tensor, change_a_dtype, change_the_config]
)
def test_a_folder_that_reads_back_otherwise_is_not_kept(
    make_model, make_recipe, windows, tmp_path, monkeypatch, change
):
    load = folder.load

    def other(*args, **kwargs):
        model = load(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(folder, "load", other)
    with pytest.raises(CheckpointError):
        slimrank.compress(make_model("llama"), make_recipe(), out=tmp_path / "out", windows=windows)
    assert blocks_alone(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_what_exists_is_not_overwritten(dense_folder, make_recipe, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(dense_folder if kind == "link" else tmp_path / "nowhere")
    monkeypatch.setattr(torch.nn.Module, "__call__", fail_with(AssertionError("work was done")))
    with pytest.raises(CheckpointError, match="exists already"):
        slimrank.compress(dense_folder, make_recipe(), out=out)
    assert os.path.lexists(out)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_appears_meanwhile_is_not_overwritten(
    make_model, make_recipe, windows, tmp_path, monkeypatch
):
    out, load = tmp_path / "out", folder.load

    def slow(*args, **kwargs):
        out.mkdir()
        return load(*args, **kwargs)

    monkeypatch.setattr(folder, "load", slow)
    with pytest.raises(CheckpointError, match="appeared meanwhile"):
        slimrank.compress(make_model("llama"), make_recipe(), out=out, windows=windows)
    assert not list(out.iterdir())
    out.rmdir()
    assert blocks_alone(tmp_path)


def test_a_parent_that_is_a_file_is_refused_before_any_work(
    dense_folder, make_recipe, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(torch.nn.Module, "__call__", fail_with(AssertionError("work was done")))
    with pytest.raises(CheckpointError, match="cannot write to"):
        slimrank.compress(dense_folder, make_recipe(), out=tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="cannot write to"):
        slimrank.compress(dense_folder, make_recipe(), out=tmp_path / "file" / "deeper" / "out")


def test_missing_parents_are_made(make_model, make_recipe, windows, tmp_path):
    out = tmp_path / "a" / "b" / "out"
    slimrank.compress(make_model("llama"), make_recipe(), out=out, windows=windows)
    slimrank.load(out)


def test_a_name_with_odd_characters(make_model, make_recipe, windows, tmp_path):
    out = tmp_path / "a model {0} ü %s"
    slimrank.compress(make_model("llama"), make_recipe(), out=out, windows=windows)
    slimrank.load(out)
    assert read_folder(out).report_fits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_its_user_cast_can_be_written(
    make_model, make_recipe, windows, tmp_path, dtype
):
    """Casting a module rounds its rotary frequencies too, which a checkpoint does not hold."""
    model = make_model("llama").to(dtype)
    with pytest.warns(NumericalWarning, match="inv_freq was changed after loading"):
        slimrank.compress(model, make_recipe(), out=tmp_path / "out", windows=windows)
    slimrank.load(tmp_path / "out")


def test_keep_all_gives_a_dense_folder(make_model, make_recipe, windows, tmp_path):
    model = make_model("llama")
    slimrank.compress(model, make_recipe(keep=1.0), out=tmp_path / "out", windows=windows)
    again = slimrank.load(tmp_path / "out")
    assert again.state_dict().keys() == make_model("llama").state_dict().keys()
    with pytest.raises(CheckpointError, match="not compressed"):
        read_folder(tmp_path / "out")


def test_a_tokenizer_with_two_chat_templates(
    make_model, make_recipe, windows, tmp_path, monkeypatch
):
    """It writes a folder of its own; and no file is synced twice."""
    tokenizer = TINY.build_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "tools {{ messages }}"}
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    slimrank.compress(
        make_model("llama"), make_recipe(), out=out, windows=windows, tokenizer=tokenizer
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    passing = [
        name.rpartition("partial-")[2].partition("/")[2] for name in synced if "partial-" in name
    ]
    written = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert "additional_chat_templates/tool_use.jinja" in written
    assert sorted(name for name in passing if name) == sorted(written)
