"""A healing that was cut off goes on to the bits of one that was not."""

import json

import pytest
import torch

from interrupted import CutOff, timeless
from slimrank import TokenWindows
from slimrank.checkpoint import HealState, state_folder
from slimrank.errors import CheckpointError, NumericalError, NumericalWarning
from slimrank.healing import run as healing
from slimrank.healing import training
from tiny.faults import Killed, full_disk, killed

SETTINGS = {"epochs": 2, "patience": 99}  # six steps, a check after each
KINDS = {"factors": {}, "adapters": {"lora_rank": 2}}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Keep what there is after every check."""
    monkeypatch.setattr(training, "SPACING", 0.0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def start(run):
    """`start(stop=n)` is cut off in front of step n."""

    def begin(stop=None, settings=None, **others):
        def track(steps, _what):
            for step in steps:
                if step == stop:
                    raise CutOff
                yield step

        return run(settings={**SETTINGS, **(settings or {})}, track=track, **others)

    return begin


def assert_same(out, expected):
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"heal.json", "README.md"}:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    one, other = (json.loads((folder / "heal.json").read_text()) for folder in (out, expected))
    assert timeless(one) == timeless(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cut_off_again_and_again(kind, dtype, start, make_small, out):
    folder = make_small("llama", {"dtype": dtype})
    whole = start(folder=folder, out="whole", settings=KINDS[kind])
    for stop in (1, 1, 4, 5):
        with pytest.raises(CutOff):
            start(stop, folder=folder, settings=KINDS[kind], resume=True)
        assert not out.exists()
        kept = sorted(path.name for path in state_folder(out).iterdir())
        assert kept[:2] == ["heal-run.json", "lock"]
        assert kept[2:] == [f"step-{stop:09d}.{ending}" for ending in ("json", "safetensors")]
    report = start(folder=folder, settings=KINDS[kind], resume=True)
    assert report.kept_step == whole.kept_step > 0
    assert_same(out, out.parent / "whole")
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "whole"]


def test_the_best_and_the_stop_are_kept(start, out, measured):
    """It goes on behind its best step, and stops where it would have stopped."""
    settings = {"epochs": 9, "patience": 3, "checks": 27}
    measured(1.0, 0.9, 0.95, 0.97, 0.98, 0.9)
    whole = start(out="whole", settings=settings)
    assert (whole.kept_step, whole.checks[-1].step) == (1, 4)
    measured(1.0, 0.9, 0.95, 0.97)
    with pytest.raises(CutOff):
        start(3, settings=settings)
    measured(1.0, 0.98, 0.9)
    start(settings=settings, resume=True)
    assert_same(out, out.parent / "whole")


def test_nothing_is_kept_before_the_first_check(start, out):
    with pytest.raises(CutOff):
        start(0)
    assert not list(out.parent.iterdir())


def test_short_runs_keep_nothing(start, out, monkeypatch):
    monkeypatch.setattr(training, "SPACING", 60.0)
    with pytest.raises(CutOff):
        start(5)
    assert not list(out.parent.iterdir())


def test_it_is_not_written_over(start, out):
    with pytest.raises(CutOff):
        start(2)
    with pytest.raises(CheckpointError, match=r"unfinished healing is in .* go on with --resume"):
        start()
    assert (state_folder(out) / "step-000000002.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"learning_rate": 1e-4}}, "another settings; give"),
        ({"settings": {"lora_rank": 2}}, "another settings; give"),
        ({"windows": 1}, "another text; give"),
        ({"folder": 1}, "another folder; give"),
        ({"teacher": 1}, "another dense model; give"),
    ],
    ids=["rate", "adapters", "text", "folder", "teacher"],
)
def test_another_one_is_refused(change, message, start, out, make_small, make_folder, make_windows):
    others = {
        "windows": lambda: TokenWindows((*make_windows(16, 20, seed=7).windows,)),
        "folder": lambda: make_small(keep=0.6),
        "teacher": lambda: make_folder("llama", seed=5),
    }
    with pytest.raises(CutOff):
        start(2)
    values = {key: others[key]() if key in others else value for key, value in change.items()}
    with pytest.raises(CheckpointError, match=f"unfinished healing in .* begun with {message}"):
        start(resume=True, **values)
    assert (state_folder(out) / "step-000000002.json").exists()
    start(resume=True)


def test_another_version_is_told(start, out, monkeypatch):
    with pytest.raises(CutOff):
        start(2)
    real = healing.environment
    monkeypatch.setattr(healing, "environment", lambda model: real(model) | {"threads": "64"})
    with pytest.warns(NumericalWarning, match=r"healing was begun with another threads 1 -> 64"):
        report = start(resume=True)
    assert any("threads 1 -> 64" in warning for warning in report.warnings)


def test_an_error_that_would_come_again_leaves_nothing(start, out, measured, monkeypatch):
    measured(1.0, 0.9, 0.8)
    with pytest.raises(CutOff):
        start(2)
    assert state_folder(out).exists()

    measured(1.0)
    nan = (torch.tensor(torch.nan, requires_grad=True), 1)
    monkeypatch.setattr("slimrank.healing.distillation.Distillation.total", lambda *_: nan)
    with pytest.raises(NumericalError, match="not finite in step 3 of 6"):
        start(resume=True)
    assert not list(out.parent.iterdir())


def test_damage_is_refused(start, out):
    with pytest.raises(CutOff):
        start(2)
    path = state_folder(out) / "step-000000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"step-000000002\.safetensors is damaged"):
        start(resume=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*step-000000002\.safetensors"):
        start(resume=True)


def test_a_snapshot_that_does_not_fit_is_refused(start, out):
    """Sealed by whoever wrote it, so nothing but its names and shapes tell."""
    with pytest.raises(CutOff):
        start(2)
    with HealState.resume(out) as state:
        good, last = state.tensors(), state.last
        for name, value in (
            ("master.0", torch.zeros(2, 2)),
            ("master.0", good["master.0"].double()),
            ("moment.0.exp_avg", torch.zeros(3)),
            ("moment.x.step", torch.tensor(1.0)),
        ):
            state.save(last, {**good, name: value})
            state.close()
            with pytest.raises(CheckpointError, match=r"does not fit: .*; delete it"):
                start(resume=True)
            state = HealState.resume(out)
        state.save(last, {name: value for name, value in good.items() if name != "master.1"})
        state.close()
        with pytest.raises(CheckpointError, match=r"does not fit: .*master\.1"):
            start(resume=True)


def test_cut_off_when_only_the_state_is_left(start, run, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("slimrank.checkpoint.HealState.remove", lambda _self: None)
        report = start()
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.unfinished", "out"]
    with pytest.raises(CheckpointError, match="exists already"):
        start(settings={"seed": 1}, resume=True)
    assert start(resume=True) == report
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="exists already"):
        start(resume=True)


def moments(steps, count=6):
    return sorted({1, *(steps * n // count for n in range(1, count)), steps - 2})


def test_killed_at_any_step_on_the_disk(start, out):
    start(out="whole")
    root = out.parent
    with killed(root, None) as done:
        start(out="counted")
    for moment in moments(len(done)):
        with pytest.raises(Killed), killed(root, moment):
            start()
        start(resume=True)
        assert_same(out, root / "whole")
        assert sorted(p.name for p in root.iterdir()) == ["counted", "out", "whole"]
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_a_full_disk_at_any_step(start, out):
    start(out="whole")
    root = out.parent
    with full_disk(root, None) as done:
        start(out="counted")
    went_on = 0
    for moment in moments(len(done)):
        with pytest.raises(CheckpointError, match="No space left"), full_disk(root, moment):
            start()
        assert not out.exists()
        went_on += state_folder(out).exists()
        start(resume=True)
        assert_same(out, root / "whole")
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert went_on
