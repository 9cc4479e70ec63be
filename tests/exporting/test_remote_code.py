"""A copy with the modelling file is the same folder otherwise."""

import pytest

from slimrank import compress, load, quantize
from slimrank.checkpoint import has_remote_code, read_folder
from slimrank.errors import CheckpointError, ModelError
from slimrank.exporting import export_dense, export_remote_code
from tiny.folders import edit_weights

CHANGED = {"README.md", "config.json", "modeling_low_rank.py"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in CHANGED}


def assert_copied(source, out):
    report = export_remote_code(source, out)
    assert contents(out) == contents(source)
    assert has_remote_code(out)
    found = read_folder(out)
    assert report.linears == len({*found.ranks, *found.int8})
    assert report.weight_bytes == found.size.weight_bytes
    return (out / "README.md").read_text()


def test_it_copies_and_adds(compressed_folder, tmp_path):
    card = assert_copied(compressed_folder, tmp_path / "out")
    assert 'from_pretrained("out")' in card
    assert "modeling_low_rank.py" in card


def test_shards_and_eight_bits_and_folders_without_a_report(compressed_folder, tmp_path):
    load(compressed_folder).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    export_remote_code(tmp_path / "shards", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "shards")
    quantize(compressed_folder, tmp_path / "int8", dense_linears=True)
    assert_copied(tmp_path / "int8", tmp_path / "out")


def test_a_copy_of_a_copy_is_the_same_and_a_dense_one_has_no_file(compressed_folder, tmp_path):
    export_remote_code(compressed_folder, tmp_path / "once")
    assert_copied(tmp_path / "once", tmp_path / "twice")
    export_dense(tmp_path / "once", tmp_path / "dense")
    assert not (tmp_path / "dense" / "modeling_low_rank.py").exists()
    assert "auto_map" not in (tmp_path / "dense" / "config.json").read_text()


@pytest.mark.parametrize("cause", ["dense", "exists", "damaged", "split"])
def test_what_cannot_be_copied_is_refused(
    cause, dense_folder, compressed_folder, make_folder, make_recipe, make_windows, tmp_path
):
    source, out = compressed_folder, tmp_path / "out"
    kind, message = CheckpointError, ""
    if cause == "dense":
        source, message = dense_folder, "not compressed by slimrank"
    elif cause == "exists":
        out, message = tmp_path, "exists already"
    elif cause == "damaged":
        source, message = tmp_path / "source", "missing keys: model.norm.weight"
        load(compressed_folder).save_pretrained(source)
        edit_weights(source, lambda tensors: tensors.pop("model.norm.weight"))
    else:
        source, message = tmp_path / "source", "projections that were taken apart"
        kind, recipe = ModelError, make_recipe(0.6, kv_cache={"keep": 0.5})
        compress(make_folder("phi3"), recipe, out=source, windows=make_windows())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message):
        export_remote_code(source, out)
    assert sorted(tmp_path.iterdir()) == before
