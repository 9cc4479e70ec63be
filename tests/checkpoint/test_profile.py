"""A profile folder that is not what was written does not open."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slimrank
from slimrank.checkpoint import Profile, read_profile
from slimrank.checkpoint.profile import (
    HELD_OUT,
    MANIFEST,
    SEAL,
    SPECTRA,
    block_file,
    write_manifest,
    write_tensors,
)
from slimrank.errors import CheckpointError
from tiny import profiles


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def whole(model, make_profile) -> Profile:
    return make_profile(model)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole.folder, tmp_path / "profile"))


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def reseal(folder: Path, **changes: object) -> None:
    """Write the manifest of another version, as that version would."""
    values = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(values))
    digest = slimrank.checkpoint.profile.file_hash(folder / MANIFEST)
    (folder / SEAL).write_text(f"{digest}  {MANIFEST}\n")


def test_it_reads_back(whole, model):
    again = read_profile(whole.folder)
    assert again.manifest == whole.manifest
    for name, values in whole.spectra.items():
        assert torch.equal(again.spectra[name], values)
        assert torch.equal(again.measured[name], whole.measured[name])
        weight = model.get_submodule(name).weight
        one, other = (x.decomposition(name, weight, 3) for x in (again, whole))
        assert torch.equal(one.basis, other.basis)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", [MANIFEST, SPECTRA, SEAL])
def test_a_flipped_bit_is_seen_on_opening(folder, name, place):
    flip(folder / name, place)
    with pytest.raises(CheckpointError, match=r"is damaged: it is not what was written"):
        read_profile(folder)


@pytest.mark.parametrize("name", [block_file(1), HELD_OUT])
def test_a_flipped_bit_is_seen_on_use(folder, name, make_model, make_recipe):
    flip(folder / name)
    model = make_model("llama")
    recipe = make_recipe(allocation="swift" if name == HELD_OUT else "uniform")
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        slimrank.compress(model, recipe, profile=folder)
    assert not any(isinstance(m, slimrank.LowRankLinear) for m in model.modules())


@pytest.mark.parametrize("name", [MANIFEST, SPECTRA, block_file(0)])
def test_a_truncated_file(folder, name, make_model, make_recipe):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        slimrank.compress(make_model("llama"), make_recipe(), profile=folder)


@pytest.mark.parametrize("name", [MANIFEST, SEAL, SPECTRA, block_file(0), HELD_OUT])
def test_a_missing_file(folder, name, make_model, make_recipe):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}"):
        slimrank.compress(make_model("llama"), make_recipe(), profile=folder)


def test_what_is_no_profile(tmp_path, compressed_folder):
    for path in (tmp_path, tmp_path / "nowhere", compressed_folder):
        with pytest.raises(CheckpointError, match=r"holds no profile\.json; it is no profile"):
            read_profile(path)


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_version_is_named(folder, version):
    reseal(folder, format_version=version, some_new_key=1)
    with pytest.raises(CheckpointError, match=rf"format version {version}; .* upgrade slimrank"):
        read_profile(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"some_key": 1}, "is no profile: some_key: "), ({"tokens": "many"}, "is no profile: tokens")],
)
def test_a_manifest_of_something_else(folder, changes, message):
    reseal(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_profile(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_no_json(folder):
    (folder / MANIFEST).write_text("[")
    digest = slimrank.checkpoint.profile.file_hash(folder / MANIFEST)
    (folder / SEAL).write_text(f"{digest}  {MANIFEST}\n")
    with pytest.raises(CheckpointError, match=r"is no profile: Invalid JSON"):
        read_profile(folder)


def test_spectra_that_lack_a_linear(folder, whole):
    tensors = {f"{n}.singular_values": x for n, x in whole.spectra.items()}
    files = whole.manifest.files | write_tensors(folder, SPECTRA, tensors)
    with pytest.raises(CheckpointError, match=r"lacks \S+\.measured_losses"):
        write_manifest(folder, whole.manifest.model_copy(update={"files": files}))


def test_a_basis_of_another_shape(folder, whole, model):
    name = "model.layers.0.mlp.up_proj"
    files = whole.manifest.files | write_tensors(
        folder, block_file(0), {f"{name}.basis": torch.zeros(48, 3)}
    )
    write_manifest(folder, whole.manifest.model_copy(update={"files": files}))
    opened = read_profile(folder)
    for lost in (name, "model.layers.0.mlp.gate_proj"):
        with pytest.raises(CheckpointError, match=f"holds no basis of {lost}"):
            opened.decomposition(lost, model.get_submodule(lost).weight, 2)


def test_what_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        slimrank.checkpoint.profile, "load_file", lambda _path: {"a": torch.ones(3)}
    )
    with pytest.raises(CheckpointError, match="does not read back"):
        write_tensors(tmp_path, "x.safetensors", {"a": torch.zeros(3)})


def test_the_authors_importance_of_the_last_block():
    found = profiles.build({"0.q": [2.0, 1.0], "1.q": [2.0, 1.0]}, [0.1, 0.2], after_norm=0.7)
    assert [x.importance for x in found.allocation_profiles()] == [0.1, 0.2]
    assert [x.importance for x in found.allocation_profiles(after_norm=True)] == [0.1, 0.7]
    without = profiles.build({"0.q": [2.0, 1.0]}, [0.1])
    with pytest.raises(CheckpointError, match="no importance after the final norm"):
        without.allocation_profiles(after_norm=True)


def change_linear(folder, **changes):
    values = json.loads((folder / MANIFEST).read_text())
    linears = [{**values["linears"][0], **changes}, *values["linears"][1:]]
    reseal(folder, linears=linears)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 2}, "is of block 2, which has no entry"),
        ({"block": -1}, r"linears: 0: block"),
        ({"out_features": 0}, r"linears: 0: out_features"),
        ({"in_features": 10**30}, r"linears: 0: in_features"),
        ({"out_features": 5, "in_features": 5}, "has a spectrum of another linear"),
        ({"name": "model.layers.1.mlp.up_proj"}, "a linear is named twice"),
    ],
)
def test_a_sealed_manifest_that_contradicts_itself(folder, changes, message):
    change_linear(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_profile(folder)


def with_tensors(folder, name, change):
    """Write a file of a profile anew, with the hash that belongs to it."""
    tensors = load_file(folder / name)
    change(tensors)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    reseal(folder, files={**files, **write_tensors(folder, name, tensors)})


@pytest.mark.parametrize("value", [torch.zeros(3, 3).double(), torch.zeros(32)])
def test_sealed_spectra_that_are_none(folder, value):
    name = "model.layers.0.mlp.up_proj.singular_values"
    with_tensors(folder, SPECTRA, lambda tensors: tensors.update({name: value}))
    with pytest.raises(CheckpointError, match=f"{name} is no list of numbers"):
        read_profile(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"7": tensors.pop("0")}),
        lambda tensors: tensors.update({"0": tensors["0"].float()}),
        lambda tensors: tensors.update({"0": tensors["0"][None]}),
    ],
)
def test_sealed_windows_that_are_none(folder, change):
    with_tensors(folder, HELD_OUT, change)
    with pytest.raises(CheckpointError, match="holds no windows"):
        read_profile(folder).held_out()


def test_a_basis_of_other_numbers_and_a_weight_of_other_sides(folder, model):
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    with pytest.raises(CheckpointError, match="is of another model"):
        read_profile(folder).decomposition(name, weight.mT, 2)
    key = f"{name}.basis"
    with_tensors(folder, block_file(0), lambda tensors: tensors.update({key: tensors[key].int()}))
    with pytest.raises(CheckpointError, match=f"holds no basis of {name}"):
        read_profile(folder).decomposition(name, weight, 2)
