"""What is finished of a run survives whatever stops it, and nothing else is taken for it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimrank.checkpoint import (
    UNFINISHED_RUN,
    RunManifest,
    RunState,
    removed_what_is_left,
    state_folder,
)
from slimrank.checkpoint.durable import locked
from slimrank.checkpoint.manifest import differences, warn_of_differences
from slimrank.checkpoint.profile_state import ProfileRun, ProfileState
from slimrank.checkpoint.state import LOCK, MANIFEST
from slimrank.errors import CheckpointError, NumericalWarning
from slimrank.nn import LowRankLinear
from slimrank.report import (
    AllocationReport,
    BlockError,
    BlockReport,
    ImportanceWeightTrial,
    LinearReport,
    RefinementEpoch,
    RefinementReport,
)
from tiny.faults import full_disk

FINGERPRINTS = {
    "recipe_fingerprint": "a" * 64,
    "model_fingerprint": "b" * 64,
    "calibration_fingerprint": "c" * 64,
    "dtype": "bfloat16",
}
ALL_FILES = [MANIFEST, *(f"block-000{i}.{e}" for i in (0, 1) for e in ("json", "safetensors"))]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the package may catch it."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "small"


@pytest.fixture
def manifest() -> RunManifest:
    return RunManifest(
        **FINGERPRINTS,
        versions={"torch": "2.13.0", "threads": "2"},
        ranks={"layers.0.up": 4, "layers.0.down": None},
        allocation=AllocationReport(
            importance_weight=0.3,
            retained_share=0.5,
            trials=(ImportanceWeightTrial(importance_weight=0.3, perplexity=1 / 3),),
        ),
    )


def tensors(index: int) -> dict[str, Tensor]:
    """What the state dict of a block may hold."""
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return {
        **{str(dtype).removeprefix("torch."): values.to(dtype) for dtype in dtypes},
        "transposed": values.T,
        "part": values[1:2, ::2],
        "same": values,
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 5e-324], dtype=torch.float64),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "number": torch.tensor(index),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(values.float()),
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        one, other = (x.detach().contiguous().reshape(-1) for x in (found[name], tensor))
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def reports(index: int) -> tuple[list[LinearReport], BlockReport]:
    name = f"layers.{index}"
    error = BlockError(relative_error=1 / 3, cosine_distance=1e-17)
    refinement = RefinementReport(
        start_loss=float("inf"),
        start_held_out_loss=None,
        epochs=(RefinementEpoch(loss=0.1, held_out_loss=2 / 3, seconds=1.5),),
        kept_epoch=1,
        trained_params=10,
        seconds=1.6,
    )
    linear = LinearReport(name=f"{name}.up", rank=4, params_before=100, params=80, tokens=7)
    block = BlockReport(
        index=index,
        name=name,
        calibration=error,
        held_out=None,
        unrefined_calibration=error,
        refinement=refinement,
        seconds={"solve": 0.1},
        peak_bytes=1,
    )
    return [linear], block


def keep(state: RunState, index: int) -> None:
    linears, block = reports(index)
    state.save(index, tensors(index), linears, block, [f"remark {index}"])


@pytest.fixture
def left(out: Path, manifest: RunManifest) -> Path:
    """The folder of a run that was cut off after two blocks."""
    with RunState.begin(out, manifest) as state:
        keep(state, 0)
        keep(state, 1)
    return state_folder(out)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


def test_it_reads_back(left, out, manifest):
    assert {path.name for path in left.iterdir()} == {LOCK, *ALL_FILES}
    with RunState.resume(out) as state:
        assert state.manifest == manifest
        assert [entry.index for entry in state.finished] == [0, 1]
        for index, entry in enumerate(state.finished):
            linears, block = reports(index)
            assert (entry.linears, entry.block) == (tuple(linears), block)
            assert entry.warnings == (f"remark {index}",)
            assert_same_bits(state.load(index), tensors(index))


def test_tensors_of_a_low_rank_linear_read_back(out, manifest):
    generator = torch.Generator().manual_seed(0)
    linear = LowRankLinear(6, 4, rank=2, bias=True, dtype=torch.bfloat16)
    for parameter in linear.parameters():
        parameter.data.normal_(generator=generator)
    saved = linear.state_dict()
    assert any(tensor.numel() == 0 for tensor in saved.values())
    with RunState.begin(out, manifest) as state:
        state.save(0, saved, *reports(0))
        assert_same_bits(state.load(0), saved)
        again = LowRankLinear(6, 4, rank=2, bias=True, dtype=torch.bfloat16)
        again.load_state_dict(state.load(0))
    assert torch.equal(again.expand.weight, linear.expand.weight)


def test_what_was_loaded_outlives_the_folder(left, out):
    with RunState.resume(out) as state:
        loaded = state.load(1)
        state.remove()
    assert_same_bits(loaded, tensors(1))


def test_a_resumed_run_goes_on(left, out):
    with RunState.resume(out) as state:
        keep(state, 2)
    with RunState.resume(out) as state:
        assert len(state.finished) == 3
        assert_same_bits(state.load(2), tensors(2))


@pytest.mark.parametrize("index", [1, 3])
def test_blocks_are_kept_in_order(left, out, index):
    with (
        RunState.resume(out) as state,
        pytest.raises(CheckpointError, match=rf"block {index} cannot .* block 2 is next"),
    ):
        keep(state, index)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_block_that_is_not_finished_is_not_loaded(left, out, index):
    with (
        RunState.resume(out) as state,
        pytest.raises(CheckpointError, match=f"block {index} is not finished"),
    ):
        state.load(index)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("recipe_fingerprint", "another recipe;"),
        ("model_fingerprint", "another model;"),
        ("calibration_fingerprint", "another calibration text;"),
        ("dtype", r"another dtype \(bfloat16, not other\);"),
    ],
)
def test_another_run_is_refused_by_name(left, out, key, named):
    with RunState.resume(out) as state:
        state.require(**FINGERPRINTS)
        with pytest.raises(CheckpointError, match=named):
            state.require(**FINGERPRINTS | {key: "other"})


def test_all_that_is_another_is_named(left, out):
    named = "another recipe, model, calibration text, dtype"
    with RunState.resume(out) as state, pytest.raises(CheckpointError, match=named):
        state.require(**dict.fromkeys(FINGERPRINTS, "other"))


def test_differences_of_versions(left, out):
    with RunState.resume(out) as state:
        versions = state.manifest.versions
    warn_of_differences("run", versions, versions)
    now = {"torch": "2.14.0", "threads": "2", "device": "cpu"}
    assert differences(versions, now) == ["torch 2.13.0 -> 2.14.0", "device none -> cpu"]
    assert differences(versions, {"torch": "2.13.0"}) == ["threads 2 -> none"]
    with pytest.warns(NumericalWarning, match=r"the run was begun with another threads 2 -> none"):
        warn_of_differences("run", versions, {"torch": "2.13.0"})


def test_what_is_no_unfinished_run(out, left, manifest):
    with pytest.raises(CheckpointError, match=r"no unfinished run for .*other; start without"):
        RunState.resume(out.parent / "other")
    with pytest.raises(CheckpointError, match=r"unfinished run is in .*--resume, or delete it"):
        RunState.begin(out, manifest)
    with RunState.resume(out) as state:  # untouched by both
        assert len(state.finished) == 2


def test_a_run_is_told_from_none(left, out):
    assert UNFINISHED_RUN.is_kept(out)
    with pytest.raises(CheckpointError, match=r"unfinished run is in .*--resume, or delete it"):
        UNFINISHED_RUN.require_none(out)
    RunState.resume(out).remove()
    assert not UNFINISHED_RUN.is_kept(out)
    UNFINISHED_RUN.require_none(out)


def test_blocks_without_a_manifest_are_not_written_over(left, out, manifest):
    (left / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"nothing is finished .* no run\.json"):
        RunState.resume(out)
    with pytest.raises(CheckpointError, match=r"holds files but no run\.json; delete it"):
        RunState.begin(out, manifest)
    assert (left / "block-0001.json").exists()


def killed_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int, after: bool) -> None:
    """Stop the process at one call of a function of `os`, before or after its work."""
    real, calls = getattr(os, function), iter(range(100))

    def stopping(*values: object) -> None:
        last = next(calls) == call
        if not (last and not after):
            real(*values)
        if last:
            raise Killed

    monkeypatch.setattr(os, function, stopping)


# a save calls fsync for its tensors, the folder, its JSON and the folder, and replace twice
STAGES = [("fsync", call, after) for call in range(4) for after in (False, True)] + [
    ("replace", call, after) for call in range(2) for after in (False, True)
]


@pytest.mark.parametrize(("function", "call", "after"), STAGES)
def test_a_block_killed_while_it_is_written(left, out, monkeypatch, function, call, after):
    with RunState.resume(out) as state, monkeypatch.context() as patch:
        killed_at(patch, function, call, after)
        with pytest.raises(Killed):
            keep(state, 2)
    done = (function, call, after) == ("replace", 1, True) or (function, call) == ("fsync", 3)
    with RunState.resume(out) as state:
        assert len(state.finished) == 3 if done else 2
        assert not list(left.glob("*.partial"))
        if not done:
            keep(state, 2)
        for index in range(3):
            assert_same_bits(state.load(index), tensors(index))


@pytest.mark.parametrize("stage", [("fsync", 0, False), ("fsync", 1, True), ("replace", 0, False)])
def test_a_run_killed_before_its_manifest_starts_over(out, manifest, monkeypatch, stage):
    with monkeypatch.context() as patch:
        killed_at(patch, *stage)
        with pytest.raises(Killed):
            RunState.begin(out, manifest)
    with pytest.raises(CheckpointError, match="nothing is finished in"):
        RunState.resume(out)
    with RunState.begin(out, manifest) as state:
        keep(state, 0)
        assert not list(state.folder.glob("*.partial"))


def test_a_torn_passing_file_is_ignored(left, out):
    (left / "block-0002.safetensors.partial").write_bytes(b"half")
    (left / "block-0002.safetensors").write_bytes(b"of a block without its JSON")
    with RunState.resume(out) as state:
        assert len(state.finished) == 2
        assert not list(left.glob("*.partial"))
        keep(state, 2)
        assert_same_bits(state.load(2), tensors(2))


@pytest.mark.parametrize("place", [0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_flipped_bit_is_seen(left, out, name, place):
    flip(left / name, place)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: .*; delete ") as caught:
        RunState.resume(out)
    if name != MANIFEST:
        assert f"delete {name.split('.')[0]}.* and the blocks after it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 20, -7, -1])
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_truncated_file_is_seen(left, out, name, size):
    path = left / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        RunState.resume(out)


def test_damage_after_opening_is_seen(left, out):
    with RunState.resume(out) as state:
        flip(left / "block-0001.safetensors", 0.9)
        with pytest.raises(CheckpointError, match=r"block-0001\.safetensors is damaged"):
            state.load(1)
        (left / "block-0000.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"cannot read .*block-0000\.safetensors"):
            state.load(0)


@pytest.mark.parametrize("name", ["block-0000.json", "block-0001.safetensors"])
def test_a_missing_file_is_seen(left, out, name):
    (left / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {name}.*; delete {name.split('.')[0]}"):
        RunState.resume(out)


def test_a_block_in_the_place_of_another_is_seen(left, out):
    for ending in ("json", "safetensors"):
        shutil.copy(left / f"block-0000.{ending}", left / f"block-0001.{ending}")
    with pytest.raises(CheckpointError, match=r"block-0001\.json is of block 0"):
        RunState.resume(out)


def test_the_advice_on_a_damaged_block_helps(left, out):
    flip(left / "block-0001.json", 0.5)
    for path in left.glob("block-0001.*"):
        path.unlink()
    with RunState.resume(out) as state:
        assert len(state.finished) == 1
        keep(state, 1)


def test_another_version_is_named(out, manifest):
    newer = manifest.model_copy(update={"format_version": 2})
    RunState.begin(out, newer).close()
    with pytest.raises(CheckpointError, match=r"format version 2, .* reads version 1\); delete"):
        RunState.resume(out)


def test_the_folder_is_for_one_process(out, manifest):
    first = RunState.begin(out, manifest)
    with pytest.raises(CheckpointError, match=r"another process works on .*small"):
        RunState.begin(out, manifest)
    with pytest.raises(CheckpointError, match=r"another process works on .*small"):
        RunState.resume(out)
    first.close()
    first.close()
    with RunState.resume(out), pytest.raises(CheckpointError, match="another process"):
        RunState.resume(out)
    RunState.resume(out).close()


def test_a_refused_folder_is_not_kept_locked(left, out, manifest):
    content = (left / "block-0001.json").read_bytes()
    flip(left / "block-0001.json", 0.5)
    with pytest.raises(CheckpointError, match="damaged"):
        RunState.resume(out)
    with pytest.raises(CheckpointError, match="an unfinished run is in"):
        RunState.begin(out, manifest)
    (left / "block-0001.json").write_bytes(content)
    RunState.resume(out).close()


def test_a_lock_that_was_removed_is_no_lock(left, out, monkeypatch):
    """A process opens the lock, another one ends and removes it, and only then it is taken."""
    fcntl = pytest.importorskip("fcntl")
    real, others = fcntl.flock, []

    def flock(file, how):
        if not others:
            (left / LOCK).unlink()
            others.append((left / LOCK).open("ab"))
            real(others[0], how)
            real(file, how)
        else:
            real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="another process works on"):
        RunState.resume(out)
    others[0].close()
    RunState.resume(out).close()


def test_a_lock_that_was_removed_is_taken_anew(left, out, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(file)
        if len(calls) == 1:
            (left / LOCK).unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(left, out):
        assert len(calls) == 2
        with pytest.raises(CheckpointError, match="another process works on"):
            RunState.resume(out)


def test_a_folder_that_vanishes(out, manifest, monkeypatch):
    """Its run ends between the moment at which it is seen and that at which it is locked."""
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.unfinished.sync_folder", lambda _: gone())
        gone = state_folder(out).rmdir
        with pytest.raises(CheckpointError, match="another process works on"):
            RunState.begin(out, manifest)

    def unlocked(folder, _out):
        shutil.rmtree(folder)
        return ExitStack()

    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.unfinished.locked", unlocked)
        with pytest.raises(CheckpointError, match=r"cannot write .*: No such file"):
            RunState.begin(out, manifest)


def test_who_waits_may_begin_while_the_folder_is_removed(left, out, monkeypatch):
    real = shutil.rmtree

    def rmtree(folder):
        (folder / LOCK).unlink()
        (folder / LOCK).touch()  # of the other process
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    state = RunState.resume(out)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", rmtree)
        state.remove()
    assert [path.name for path in left.iterdir()] == [LOCK]
    real(left)


SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from slimrank.checkpoint import RunState

state = RunState.resume(Path(sys.argv[1]))
entry = state.finished[0]
state.save(2, {"weight": torch.ones(3)}, entry.linears, entry.block)

def replace(*_):
    print("ready", flush=True)
    time.sleep(600)

os.replace = replace
state.save(3, {"weight": torch.ones(3)}, entry.linears, entry.block)
"""


def test_a_second_process_and_its_sigkill(left, out):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "ready\n"
            with pytest.raises(CheckpointError, match="another process works on"):
                RunState.resume(out)
        finally:
            other.send_signal(signal.SIGKILL)
    assert list(left.glob("*.partial"))
    with RunState.resume(out) as state:
        assert [entry.index for entry in state.finished] == [0, 1, 2]
        assert torch.equal(state.load(2)["weight"], torch.ones(3))
        keep(state, 3)


def test_a_full_disk(left, out, manifest, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"cannot write .*block-0002\.safetensors: No space left .* before is kept"
    with RunState.resume(out) as state:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CheckpointError, match=message):
                keep(state, 2)
            with pytest.raises(CheckpointError, match=r"cannot write .*: No space left"):
                RunState.begin(out.parent / "other", manifest)
        assert not state_folder(out.parent / "other").exists()
        assert not list(left.glob("*.partial"))
        assert len(state.finished) == 2
        keep(state, 2)  # once there is room
        assert_same_bits(state.load(2), tensors(2))


def test_remove_leaves_nothing(left, out, manifest):
    (left / "block-0007.safetensors.partial").write_bytes(b"torn")
    state = RunState.resume(out)
    state.remove()
    assert not list(out.parent.iterdir())
    RunState.begin(out, manifest).close()


@pytest.mark.parametrize(("call", "finished"), [(0, 2), (1, 1), (2, 1), (3, 0), (4, 0)])
def test_a_removal_that_is_killed_can_be_resumed(left, out, monkeypatch, call, finished):
    state = RunState.resume(out)
    with monkeypatch.context() as patch:
        killed_at(patch, "unlink", call, after=False)
        with pytest.raises(Killed):
            state.remove()
    with RunState.resume(out) as state:
        assert len(state.finished) == finished


def test_a_removal_that_is_refused(left, out, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    state = RunState.resume(out)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        with pytest.raises(CheckpointError, match=r"cannot remove .*Permission denied"):
            state.remove()
    RunState.begin(out, state.manifest).close()


@pytest.mark.parametrize("after", range(1, 5))
def test_a_disk_that_is_full_at_the_start(out, manifest, after):
    out.parent.mkdir()
    for begin in (
        lambda: RunState.begin(out, manifest),
        lambda: ProfileState.begin(out, ProfileRun(marks={}, versions={})),
    ):
        with full_disk(out.parent, after), pytest.raises(CheckpointError, match="No space left"):
            begin()
        assert not list(out.parent.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, manifest):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory"):
        RunState.begin(tmp_path / "file" / "out", manifest)


def test_ranks_are_kept_once_they_are_chosen(out, manifest):
    unsettled = manifest.model_copy(update={"ranks": None, "allocation": None})
    with RunState.begin(out, unsettled) as state:
        assert state.is_bare
        assert RunManifest.model_validate(state.manifest.model_dump()).ranks is None
        state.settle(manifest.ranks, manifest.allocation, ["a remark"])
        assert not state.is_bare
    with RunState.resume(out) as state:
        assert state.manifest == manifest.model_copy(update={"warnings": ("a remark",)})


def test_generated_sequences_are_kept_once_something_is_finished(out, manifest):
    bare = manifest.model_copy(update={"ranks": None, "allocation": None})
    with RunState.begin(out, bare) as state:
        state.settle_generated("one")
        state.settle_generated("other")  # nothing is finished of the first
        state.save(0, tensors(0), *reports(0))
    with RunState.resume(out) as state:
        assert state.manifest.generated_fingerprint == "other"
        state.settle_generated("other")
        with pytest.raises(CheckpointError, match="begun with other generated sequences"):
            state.settle_generated("one")


def test_another_profile_is_refused(out, manifest):
    with RunState.begin(out, manifest.model_copy(update={"profile_fingerprint": "p"})) as state:
        state.require(**FINGERPRINTS, profile_fingerprint="p")
        with pytest.raises(CheckpointError, match="another profile"):
            state.require(**FINGERPRINTS, profile_fingerprint="q")


@pytest.mark.parametrize("stage", [("fsync", 0, False), ("replace", 0, False)])
def test_killed_while_ranks_are_kept(out, manifest, monkeypatch, stage):
    unsettled = manifest.model_copy(update={"ranks": None, "allocation": None})
    with RunState.begin(out, unsettled) as state, monkeypatch.context() as patch:
        killed_at(patch, *stage)
        with pytest.raises(Killed):
            state.settle(manifest.ranks, manifest.allocation)
    with RunState.resume(out) as state:
        assert state.manifest == unsettled


def test_a_block_may_have_no_report_of_its_own(out, manifest):
    linears, _ = reports(0)
    with RunState.begin(out, manifest) as state:
        state.save(0, {}, linears)
        state.save(1, tensors(1), linears, warnings=["a remark"])
    with RunState.resume(out) as state:
        assert [block.block for block in state.finished] == [None, None]
        assert state.load(0) == {}
        assert_same_bits(state.load(1), tensors(1))


def test_a_run_of_before_is_read(left, out):
    """Its manifest says nothing of warnings."""
    content = json.loads((left / MANIFEST).read_text())["content"]
    for key in ("warnings", "generated_fingerprint", "profile_fingerprint"):
        del content[key]
    text = json.dumps(content).encode()
    digest = hashlib.sha256(text).hexdigest()
    (left / MANIFEST).write_bytes(b'{"sha256": "%b", "content": %b}\n' % (digest.encode(), text))
    with RunState.resume(out) as state:
        assert state.manifest.warnings == ()
        assert state.manifest.generated_fingerprint == ""
        assert len(state.finished) == 2


@pytest.mark.parametrize("name", ["profile", ".profile.unfinished"])
def test_a_profile_is_worth_keeping(out, manifest, name):
    with RunState.begin(out, manifest.model_copy(update={"allocation": None})) as state:
        assert state.is_bare
        (state.folder / name).mkdir()
        assert not state.is_bare
        state.drop_profile()
        assert state.is_bare == (name == "profile")
        state.remove()
    assert not state.folder.exists()


def test_what_is_passing_goes_and_a_profile_stays(left, out):
    for name in (".small.partial-x", ".slimrank-activations-x", "profile", ".profile.unfinished"):
        (left / name).mkdir()
        (left / name / "file").write_bytes(b"half")
    with RunState.resume(out) as state:
        folders = {path.name for path in left.iterdir() if path.is_dir()}
        assert folders == {"profile", ".profile.unfinished"}
        state.remove()
    assert not left.exists()


def test_what_is_left_of_a_run_that_is_done(left, out):
    recipe = FINGERPRINTS["recipe_fingerprint"]
    assert not removed_what_is_left(out, recipe)  # it is not done
    out.mkdir()
    assert not removed_what_is_left(out, "another")
    assert len(list(left.glob("block-*.json"))) == 2
    assert removed_what_is_left(out, recipe)
    assert not left.exists()
    assert not removed_what_is_left(out, recipe)
    left.mkdir()  # killed just before the end
    (left / LOCK).touch()
    (left / "mine").touch()
    assert not removed_what_is_left(out, recipe)
    (left / "mine").unlink()
    assert removed_what_is_left(out, recipe)
    assert not left.exists()
