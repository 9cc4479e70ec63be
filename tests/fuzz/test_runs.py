"""What an unfinished run has left, spoiled, and spoiled with hashes that are right again."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.mutation import as_json, mutated, spoiled, spoiled_tensors
from fuzz.properties import contents, examples, nothing_else_touched, put_back, right_or_refused
from slimrank import compress
from slimrank.checkpoint import RunState, state_folder

METHOD = {"method": "aa-svd"}
ENTRY, TENSORS = "block-0000.json", "block-0000.safetensors"


class CutOff(Exception):
    pass


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(**METHOD)


@pytest.fixture(scope="module")
def out(dense_folder, recipe, windows, tmp_path_factory):
    """Where a run was to write that was cut off while it wrote."""
    out = tmp_path_factory.mktemp("runs") / "small"

    def stop(*_args, **_kwargs):
        raise CutOff

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", stop)
        with pytest.raises(CutOff):
            compress(dense_folder, recipe, out=out, windows=windows)
    return out


@pytest.fixture(scope="module")
def whole(out):
    return contents(state_folder(out))


def sealed(content: bytes) -> bytes:
    """What `slimrank.checkpoint.durable.sealed` writes of JSON."""
    digest = hashlib.sha256(content).hexdigest()
    return f'{{"sha256": "{digest}", "content": '.encode() + content + b"}\n"


def entry_of(file: bytes) -> dict:
    return json.loads(file)["content"]


def open_all(out):
    """Resume a run, ask for its blocks, and let go of it."""

    def read():
        with RunState.resume(out) as state:
            for index in range(len(state.finished)):
                state.load(index)

    with nothing_else_touched(state_folder(out)):
        right_or_refused(read, out.name)


def with_files(out, whole, files, call):
    put_back(state_folder(out), {**whole, **files})
    try:
        call()
    finally:
        put_back(state_folder(out), whole)


@examples(40)
@given(data=st.data())
def test_spoiled_files(out, whole, data):
    name = data.draw(st.sampled_from(("run.json", ENTRY, TENSORS)))
    files = {name: data.draw(spoiled(whole[name]))}
    with_files(out, whole, files, lambda: open_all(out))


@examples(40)
@given(data=st.data())
def test_changed_entries(out, whole, data):
    name = data.draw(st.sampled_from(("run.json", ENTRY)))
    files = {name: sealed(as_json(data.draw(mutated(entry_of(whole[name])))))}
    with_files(out, whole, files, lambda: open_all(out))


@examples(25)
@given(data=st.data())
def test_sealed_tensors(out, whole, data):
    content = data.draw(spoiled_tensors(whole[TENSORS]))
    entry = {**entry_of(whole[ENTRY]), "sha256": hashlib.sha256(content).hexdigest()}
    files = {TENSORS: content, ENTRY: sealed(as_json(entry))}
    with_files(out, whole, files, lambda: open_all(out))


@examples(8)
@given(data=st.data())
def test_going_on_with_a_changed_run(out, whole, dense_folder, recipe, windows, data):
    """No folder comes out of it."""
    entry = entry_of(whole[ENTRY])
    linears = data.draw(mutated(entry["linears"]))
    files = {ENTRY: sealed(as_json({**entry, "linears": linears}))}

    def stop(*_args, **_kwargs):
        raise CutOff

    def go_on():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.PreTrainedModel.save_pretrained", stop)
            try:
                right_or_refused(
                    lambda: compress(dense_folder, recipe, out=out, windows=windows, resume=True)
                )
            except CutOff:
                return

    with_files(out, whole, files, go_on)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("model.layers.0.mlp.up_proj", 10**9),
        ("model.layers.0.mlp.up_proj", 0),
        ("model.layers.1.mlp.up_proj", 4),
        ("model.embed_tokens", 4),
        ("", 4),
    ],
)
def test_hostile_ranks_of_a_finished_block(out, whole, dense_folder, recipe, windows, name, rank):
    entry = entry_of(whole[ENTRY])
    entry["linears"][0] |= {"name": name, "rank": rank}
    files = {ENTRY: sealed(as_json(entry))}

    def go_on():
        found = right_or_refused(
            lambda: compress(dense_folder, recipe, out=out, windows=windows, resume=True),
            "does not fit",
        )
        assert found is None

    with_files(out, whole, files, go_on)
    assert not out.exists()
