"""Whatever transformers raises is of one type; words of ours stay, and so does a lack of memory."""

import pytest
import torch

import slimrank
from slimrank.checkpoint import told_as
from slimrank.errors import CheckpointError, ModelError
from slimrank.source import load_model, load_skeleton, load_tokenizer, parse_source


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError(), "cannot load m: KeyError"),
        (ValueError("a\n  b" + "c" * 400), "cannot load m: a b" + "c" * 297),
        (CheckpointError("x" * 500), "x" * 500),
        (ModelError("as it is"), "as it is"),
    ],
)
def test_one_type(error, said):
    with pytest.raises(ModelError) as told, told_as(ModelError, "cannot load m"):
        raise error
    assert str(told.value) == said


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA")])
@pytest.mark.parametrize("read", [load_model, load_skeleton, load_tokenizer, "load"])
def test_no_memory_is_no_fault_of_a_file(error, read, dense_folder, monkeypatch):
    def full(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("slimrank.source.AutoModelForCausalLM.from_pretrained", full)
    monkeypatch.setattr("slimrank.source.AutoConfig.from_pretrained", full)
    monkeypatch.setattr("slimrank.source.AutoTokenizer.from_pretrained", full)
    monkeypatch.setattr("slimrank.source.require_sound", lambda folder: None)
    monkeypatch.setattr("slimrank.checkpoint.loading.require_sound", lambda folder, **_: None)
    with pytest.raises(type(error)):
        slimrank.load(dense_folder) if read == "load" else read(parse_source(dense_folder))
