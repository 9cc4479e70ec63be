"""Profile folders, spoiled, and spoiled with seals that are right again."""

import hashlib
import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slimrank
from fuzz.mutation import as_json, mutated, spoiled, spoiled_tensors
from fuzz.properties import contents, examples, nothing_else_touched, put_back, right_or_refused
from slimrank.analysis import analyze
from slimrank.checkpoint import read_profile
from slimrank.checkpoint.profile import HELD_OUT, MANIFEST, SEAL, SPECTRA, block_file

FILES = (SPECTRA, HELD_OUT, block_file(0))


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(layout="auto", allocation="swift")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def folder(model, recipe, tmp_path_factory, windows):
    out = tmp_path_factory.mktemp("profiles") / "profile"
    slimrank.profile(model, recipe, out, windows=windows)
    return out


@pytest.fixture(scope="module")
def whole(folder):
    return contents(folder)


def sealed(manifest: bytes) -> dict[str, bytes]:
    """A manifest and the seal that belongs to it."""
    line = f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n"
    return {MANIFEST: manifest, SEAL: line.encode()}


def use(folder, model, files, whole):
    """Open a profile of these files and ask it for all that it holds."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        with nothing_else_touched(folder):
            profile = right_or_refused(lambda: read_profile(folder), folder)
            if profile is None:
                return
            right_or_refused(lambda: analyze(profile).csv())
            right_or_refused(profile.held_out)
            weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
            for name in profile.linears:
                right_or_refused(partial(profile.decomposition, name, weight, 2))
    finally:
        put_back(folder, whole)


@examples(50)
@given(data=st.data())
def test_changed_manifests(folder, model, whole, data):
    changed = as_json(data.draw(mutated(json.loads(whole[MANIFEST]))))
    use(folder, model, sealed(changed), whole)


@examples(20)
@given(data=st.data())
def test_spoiled_files(folder, model, whole, data):
    name = data.draw(st.sampled_from((MANIFEST, SEAL, *FILES)))
    use(folder, model, {name: data.draw(spoiled(whole[name]))}, whole)


@examples(20)
@given(data=st.data())
def test_sealed_tensors(folder, model, whole, data):
    name = data.draw(st.sampled_from(FILES))
    content = data.draw(spoiled_tensors(whole[name]))
    manifest = json.loads(whole[MANIFEST])
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    use(folder, model, {name: content, **sealed(as_json(manifest))}, whole)


@examples(8)
@given(data=st.data())
def test_compressing_from_changed_profiles(folder, whole, recipe, windows, make_model, data):
    name = data.draw(st.sampled_from(FILES))
    content = data.draw(spoiled_tensors(whole[name]))
    manifest = json.loads(whole[MANIFEST])
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    manifest = data.draw(st.one_of(st.just(manifest), mutated(manifest)))
    put_back(folder, {**whole, name: content, **sealed(as_json(manifest))})
    dense = make_model("llama")
    try:
        right_or_refused(lambda: slimrank.compress(dense, recipe, profile=folder, windows=windows))
    finally:
        put_back(folder, whole)
