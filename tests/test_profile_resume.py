"""A profile that was cut off anywhere goes on to the folder that an unbroken one writes."""

import errno
import json
import os
import shutil

import pytest

import slimrank
from interrupted import timeless
from slimrank import CompressionOptions, TokenWindows, profile
from slimrank.checkpoint.durable import LOCK
from slimrank.checkpoint.profile_state import MANIFEST, TO_BE, ProfileState
from slimrank.checkpoint.state import state_folder
from slimrank.errors import CheckpointError, NumericalWarning
from tiny.faults import Killed, killed

BLOCKS = 3
FILE = {"bases": f"{TO_BE}/block-00001.safetensors", "spectra": "block-00001.spectra.safetensors"}
FILE |= {"entry": "block-00000.json", "manifest": MANIFEST}


class CutOff(BaseException):
    pass


@pytest.fixture(scope="module")
def text(make_windows):
    return make_windows(12, 24)


@pytest.fixture(scope="module")
def dense(make_folder):
    return make_folder("llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "small"


@pytest.fixture
def start(dense, make_recipe, text, out):
    """`start(**profile)` works on `out`; `stop=k` cuts it off once k blocks are finished."""

    def begin(stop=None, model=None, recipe=None, **others):
        values = {"windows": text, "options": CompressionOptions(track=stopping(stop)), **others}
        return profile(model or dense, recipe or make_recipe(), out, **values)

    return begin


@pytest.fixture(scope="module")
def unbroken(dense, text, tmp_path_factory):
    """`unbroken(recipe, **profile)` is the folder of a profile that was not cut off."""

    def make(recipe, **others):
        folder = tmp_path_factory.mktemp("unbroken") / "small"
        profile(dense, recipe, folder, **{"windows": text, **others})
        return folder

    return make


@pytest.fixture(scope="module")
def whole(unbroken, make_recipe):
    return unbroken(make_recipe())


def stopping(after):
    def track(steps, what):
        for step in steps:
            if what == "profiling" and step == after:
                raise CutOff
            yield step

    return track


def cut_off(start, after, **others):
    with pytest.raises(CutOff):
        start(stop=after, **others)


def assert_same_profile(out, expected):
    files = {path.name for path in expected.iterdir()}
    assert {path.name for path in out.iterdir()} == files
    tensors = {name for name in files if name.endswith(".safetensors")}
    assert len(tensors) >= 2
    for name in tensors:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    one, other = (json.loads((f / "profile.json").read_text()) for f in (out, expected))
    assert timeless(one) == timeless(other)
    assert slimrank.read_profile(out).held_out() is not None


def blocks_kept(out):
    return len(list(state_folder(out).glob("block-*.json")))


@pytest.mark.parametrize("after", range(1, BLOCKS))
def test_cut_off_after_any_block(after, start, whole, out):
    cut_off(start, after)
    assert not out.exists()
    assert blocks_kept(out) == after
    start(resume=True)
    assert_same_profile(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_nothing_is_kept_before_the_first_block(start, out):
    cut_off(start, 0)
    assert not list(out.parent.iterdir())


def test_cut_off_again_and_again(start, whole, out):
    for after in (1, 1, 2):
        cut_off(start, after, resume=True)
        assert blocks_kept(out) == after
    start(resume=True)
    assert_same_profile(out, whole)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ({"method": "kfac-svd", "allocation": "global"}, {}),
        ({"allocation": "threshold"}, {}),
        ({"layout": "auto"}, {"for_kv_cache": True}),
        ({"dtype": "bfloat16"}, {"spectra_only": True}),
        ({"targets": ["re:.*layers\\.[12]\\.mlp"]}, {}),
    ],
    ids=["gradients", "threshold", "cache", "spectra", "targets"],
)
def test_other_profiles(recipe, options, start, unbroken, out, make_recipe):
    recipe = make_recipe(**recipe)
    cut_off(start, 2, recipe=recipe, **options)
    start(recipe=recipe, resume=True, **options)
    assert_same_profile(out, unbroken(recipe, **options))


def test_finished_blocks_are_not_solved_again(start, out, monkeypatch):
    cut_off(start, 2)
    solved, real = [], slimrank.profile_pass.solve

    def solve(model, site, *rest):
        solved.append(site.block)
        return real(model, site, *rest)

    monkeypatch.setattr("slimrank.profile_pass.solve", solve)
    found = start(resume=True)
    assert set(solved) == {2}
    of_blocks = sum(linear.seconds for linear in found.manifest.linears)
    assert found.manifest.seconds["solve"] > of_blocks  # what finished blocks took is in it


def test_warnings_of_finished_blocks_are_given_again(start, unbroken, make_recipe, make_windows):
    few = make_windows(2, 5)
    with pytest.warns(NumericalWarning):
        whole = slimrank.read_profile(unbroken(make_recipe(), windows=few)).manifest.warnings
    cut_off(start, 2, windows=few)
    with pytest.warns(NumericalWarning, match="saw 5 tokens"):
        found = start(windows=few, resume=True)
    assert found.manifest.warnings == whole


def test_resume_without_anything_starts(start, whole, out):
    start(resume=True)
    assert_same_profile(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


def test_an_unfinished_profile_is_not_overwritten(start, out, monkeypatch):
    cut_off(start, 1)
    monkeypatch.setattr("slimrank.profiling.open_dense", None)
    with pytest.raises(CheckpointError, match=r"profile is in .*small\.unf.*; go on with --resume"):
        start()
    assert blocks_kept(out) == 1


def test_a_profile_that_stands_is_not_gone_on_with(start, whole, out):
    start()
    with pytest.raises(CheckpointError, match="exists already"):
        start(resume=True)
    assert_same_profile(out, whole)


def test_a_run_of_compress_is_not_taken_for_one(start, out):
    state_folder(out).mkdir()
    (state_folder(out) / "run.json").touch()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"holds files but no profile-run\.json"):
            start(resume=resume)
    assert (state_folder(out) / "run.json").exists()


def test_two_processes(start, out):
    cut_off(start, 1)
    with (
        ProfileState.resume(out),
        pytest.raises(CheckpointError, match=r"another process works on .*small; wait"),
    ):
        start(resume=True)
    start(resume=True)


@pytest.mark.parametrize(
    ("recipe", "options", "named"),
    [
        ({"method": "svd-llm"}, {}, "another recipe;"),
        ({"dtype": "bfloat16"}, {}, r"another recipe, model, dtype \(float32, not bfloat16\);"),
        ({}, {"for_kv_cache": True}, r"another choice of --kv \(no, not yes\);"),
        ({}, {"spectra_only": True}, r"another choice of --spectra-only \(no, not yes\);"),
    ],
)
def test_another_recipe_is_refused(recipe, options, named, start, out, make_recipe):
    cut_off(start, 1)
    with pytest.raises(CheckpointError, match=f"begun with {named} give what") as caught:
        start(recipe=make_recipe(**recipe), resume=True, **options)
    assert "\n" not in str(caught.value)
    assert blocks_kept(out) == 1
    start(resume=True)


def test_another_model_is_refused(start, make_folder):
    cut_off(start, 1)
    with pytest.raises(CheckpointError, match="begun with another model; give what"):
        start(model=make_folder("llama", num_hidden_layers=BLOCKS, seed=1), resume=True)


@pytest.mark.parametrize("position", [0, -1], ids=["calibration", "held out"])
def test_another_text_is_refused(position, start, text):
    cut_off(start, 1)
    changed = [window.clone() for window in text.windows]
    changed[position][3] = (changed[position][3] + 1) % 90
    with pytest.raises(CheckpointError, match="begun with another calibration text; give what"):
        start(windows=TokenWindows(tuple(changed)), resume=True)


def test_the_size_may_be_another(start, whole, out, make_recipe):
    """A profile is for all sizes: what it does not look at may change."""
    cut_off(start, 1, recipe=make_recipe(keep=0.3))
    start(recipe=make_recipe(keep=0.9), resume=True)
    assert_same_profile(out, whole)


def test_another_version_is_told(start, monkeypatch):
    cut_off(start, 1)
    real = slimrank.profiling.environment
    monkeypatch.setattr(
        "slimrank.profiling.environment", lambda model: real(model) | {"threads": "64"}
    )
    with pytest.warns(NumericalWarning, match=r"begun with another threads 1 -> 64; its bits may"):
        start(resume=True)


@pytest.mark.parametrize("what", FILE)
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_refused(how, what, start, out):
    cut_off(start, 2)
    path = state_folder(out) / FILE[what]
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-9])
    pattern = rf"{path.name} is (damaged|missing).*delete"
    if (how, what) == ("missing", "manifest"):
        pattern = r"holds files but no profile-run\.json; delete it"
    if (how, what) == ("missing", "entry"):
        pattern = r"lacks block-00000\.json, but holds later blocks; delete"
    with pytest.raises(CheckpointError, match=pattern) as caught:
        start(resume=True)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_torn_files_of_a_killed_process_are_removed(start, whole, out):
    cut_off(start, 1)
    folder = state_folder(out)
    for path in (folder / "block-00001.json.partial", folder / TO_BE / "block-00001.safetensors"):
        path.write_bytes(b"torn")
    (folder / TO_BE / "profile.json").write_bytes(b"torn")
    (folder / ".slimrank-activations-x").mkdir()
    (folder / ".slimrank-activations-x" / "0.safetensors").write_bytes(b"torn")
    (folder / "block-00001.spectra.safetensors").write_bytes(b"torn")
    start(resume=True)
    assert_same_profile(out, whole)


def test_cut_off_between_its_name_and_the_removal(start, whole, out, monkeypatch):
    """The profile stands: what is left of the state goes, and nothing else is done."""
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.profile_state.remove_state_folder", cut)
        with pytest.raises(CutOff):
            start()
    assert state_folder(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.profiling.open_dense", None)
        with pytest.raises(CheckpointError, match="exists already"):
            start()
        found = start(resume=True)
    assert found.manifest == slimrank.read_profile(out).manifest
    assert_same_profile(out, whole)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("part", ["manifest", "lock"])
@pytest.mark.parametrize(
    "change", ["method", "ridge", "text", "windows", "model", "dtype", "kv", "spectra", "targets"]
)
def test_another_profile_than_what_is_left_is_not_taken_for_it(
    change, part, start, out, make_recipe, make_windows, make_folder, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.profile_state.remove_state_folder", cut)
        with pytest.raises(CutOff):
            start()
    folder = state_folder(out)
    if part == "lock":
        for path in folder.iterdir():
            path.unlink() if path.name != LOCK else None
        if change == "targets":
            return  # what is left does not tell it
    asked = {
        "method": {"recipe": make_recipe(method="svd-llm")},
        "ridge": {"recipe": make_recipe(ridge=0.02)},
        "text": {"recipe": make_recipe(calibration={"seed": 1})},
        "windows": {"windows": make_windows(12, 20)},
        "model": {"model": make_folder("llama", num_hidden_layers=BLOCKS, seed=1)},
        "dtype": {"recipe": make_recipe(dtype="bfloat16")},
        "kv": {"for_kv_cache": True},
        "spectra": {"spectra_only": True},
        "targets": {"recipe": make_recipe(targets=["up_proj"])},
    }[change]
    with pytest.raises(CheckpointError, match="exists already"):
        start(resume=True, **asked)
    assert folder.exists()
    assert start(resume=True).manifest == slimrank.read_profile(out).manifest
    assert not folder.exists()


def test_what_is_left_of_a_model_in_memory(start, out, make_model, monkeypatch):
    model, other = (make_model("llama", num_hidden_layers=BLOCKS, seed=seed) for seed in (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.profile_state.remove_state_folder", cut)
        with pytest.raises(CutOff):
            start(model=model)
    with pytest.raises(CheckpointError, match="exists already"):
        start(model=other, resume=True)
    assert start(model=model, resume=True)
    assert not state_folder(out).exists()


def test_what_is_spilled_lies_with_what_is_kept(start, out, make_recipe, monkeypatch):
    """So that it goes too if the process is killed."""
    seen, real = [], slimrank.calibration.store.save_file

    def save(tensors, path):
        seen.append(path)
        real(tensors, path)

    monkeypatch.setattr("slimrank.calibration.store.save_file", save)
    start(recipe=make_recipe(method="kfac-svd"), options=CompressionOptions(memory=0))
    assert seen
    assert all(state_folder(out) in path.parents for path in seen)
    assert [path.name for path in out.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_killed_at_any_step_on_the_disk(part, start, whole, out):
    """At every tenth step; then nothing is cleaned up, as by SIGKILL."""
    with killed(state_folder(out), None) as done:
        start()
    shutil.rmtree(out)
    bounds = {"first": (0, 0.4), "middle": (0.4, 0.8), "last": (0.8, 1)}[part]
    moments = range(*(int(len(done) * bound) for bound in bounds), 10 if part != "last" else 3)
    assert len(moments) > 1
    for moment in moments:
        with killed(state_folder(out), moment), pytest.raises(Killed):
            start()
        start(resume=True)
        assert_same_profile(out, whole)
        assert [path.name for path in out.parent.iterdir()] == ["small"], moment
        shutil.rmtree(out)


def cut(*_):
    raise CutOff


def test_what_appears_meanwhile_stays(start, whole, out, monkeypatch):
    cut_off(start, 2)
    real = slimrank.profiling.write_manifest

    def write(*arguments):
        real(*arguments)
        out.write_text("theirs")

    with monkeypatch.context() as patch:
        patch.setattr("slimrank.profiling.write_manifest", write)
        with pytest.raises(CheckpointError, match="appeared meanwhile; it was left alone"):
            start(resume=True)
    assert out.read_text() == "theirs"
    out.unlink()
    start(resume=True)
    assert_same_profile(out, whole)


def test_room_is_asked_for_what_is_missing_only(start, out, monkeypatch):
    cut_off(start, 2)
    asked, real = [], slimrank.profiling.require_space
    monkeypatch.setattr(
        "slimrank.profiling.require_space", lambda f, n: asked.append(n) or real(f, n)
    )
    with ProfileState.resume(out) as state:
        kept = state.bytes_kept
    found = start(resume=True)
    shutil.rmtree(out)
    start()
    assert kept > 0
    assert asked == [asked[1] - kept, asked[1]]
    assert found.manifest.linears


def test_a_state_that_cannot_be_removed(start, out, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        with pytest.raises(CheckpointError, match=r"cannot remove .*Permission denied"):
            start()
    slimrank.read_profile(out)
