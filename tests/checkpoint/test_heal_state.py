"""What is kept of a healing: the last snapshot, whole or not at all, for one process at a time."""

import pytest
import torch

from slimrank.checkpoint import UNFINISHED_HEALING, HealRun, HealSnapshot, HealState, state_folder
from slimrank.checkpoint.durable import sealed
from slimrank.checkpoint.heal_state import removed_what_is_left
from slimrank.errors import CheckpointError, NumericalError
from slimrank.report import HealCheck
from tiny.faults import Killed, killed

RUN = HealRun(marks={"settings": "a" * 64, "text": "b" * 64}, versions={"torch": "2"})
CHECK = HealCheck(step=0, tokens=0, seconds=0.1, divergence=1 / 3, perplexity=2.5)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def snapshot(step):
    return HealSnapshot(step=step, best_step=0, checks=(CHECK,))


def tensors(step):
    return {"master.0": torch.full((2, 3), float(step)), "moment.0.step": torch.tensor(1.0)}


def kept(out):
    return sorted(path.name for path in state_folder(out).iterdir())


def save_and_fail(state, error, *steps):
    with state:
        for step in steps:
            state.save(snapshot(step), tensors(step))
        raise error


def test_the_last_snapshot_is_what_is_kept(out):
    with HealState.begin(out, RUN) as state:
        for step in (2, 10):
            state.save(snapshot(step), tensors(step))
    assert kept(out)[2:] == ["step-000000010.json", "step-000000010.safetensors"]
    with HealState.resume(out) as state:
        assert state.manifest == RUN
        assert (state.last.step, state.last.checks) == (10, (CHECK,))
        for name, value in state.tensors().items():
            assert torch.equal(value, tensors(10)[name])
        state.remove()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_killed_at_any_step_it_has_one_of_two_snapshots(out, tmp_path):
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
    with killed(tmp_path, None) as done, HealState.resume(out) as state:
        state.save(snapshot(1), tensors(1))
    found = set()
    for moment in range(len(done)):
        with HealState.resume(out) as state:
            state.save(snapshot(1), tensors(1))
        with pytest.raises(Killed), killed(tmp_path, moment):
            save_and_fail(HealState.resume(out), Killed(), 2)
        with HealState.resume(out) as state:
            found.add(state.last.step)
            assert torch.equal(state.tensors()["master.0"], tensors(state.last.step)["master.0"])
            assert len(kept(out)) == 4
        for path in state_folder(out).glob("step-*2.*"):
            path.unlink()
    assert found == {1, 2}


def test_what_a_killed_process_left_goes(out):
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
    (state_folder(out) / ".out.partial-abc").mkdir()
    (state_folder(out) / ".out.partial-abc" / "model.safetensors").write_bytes(b"x")
    (state_folder(out) / "heal-run.json.partial").write_bytes(b"x")
    (state_folder(out) / "step-000000002.safetensors").write_bytes(b"torn")
    with HealState.resume(out):
        assert len(kept(out)) == 4


def test_two_processes(out):
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
        for again in (lambda: HealState.resume(out), lambda: HealState.begin(out, RUN)):
            with pytest.raises(CheckpointError, match="another process works on"):
                again()


@pytest.mark.parametrize(
    ("error", "saves", "stays"),
    [
        (KeyboardInterrupt, False, False),
        (KeyboardInterrupt, True, True),
        (CheckpointError, True, True),
        (NumericalError, True, False),
    ],
)
def test_what_an_error_leaves(error, saves, stays, out):
    with pytest.raises(error):
        save_and_fail(HealState.begin(out, RUN), error("so it goes"), *([1] if saves else []))
    assert UNFINISHED_HEALING.is_kept(out) == stays
    assert state_folder(out).exists() == stays


def test_what_differs_is_named(out):
    with HealState.begin(out, RUN) as state:
        state.require(RUN.marks)
        with pytest.raises(CheckpointError, match="begun with another text; give what it was"):
            state.require({**RUN.marks, "text": "c" * 64})


def test_other_files_are_not_taken_for_a_state(out):
    state_folder(out).mkdir(parents=True)
    (state_folder(out) / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds files but no heal-run\.json; delete it"):
        HealState.begin(out, RUN)
    assert not removed_what_is_left(out, "a" * 64)
    assert kept(out) == ["lock", "run.json"]


def test_what_is_left_is_removed_only_if_it_is_of_the_same(out):
    assert not removed_what_is_left(out, "a" * 64)
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
    assert not removed_what_is_left(out, "f" * 64)
    assert removed_what_is_left(out, "a" * 64)
    assert not state_folder(out).exists()


@pytest.mark.parametrize("name", ["step-000000001.json", "step-000000001.safetensors"])
def test_a_flipped_bit_is_seen(name, out):
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
    path = state_folder(out) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        HealState.resume(out)


def test_an_entry_under_another_name_is_refused(out):
    with HealState.begin(out, RUN) as state:
        state.save(snapshot(1), tensors(1))
    entry = state_folder(out) / "step-000000003.json"
    entry.write_bytes(sealed(snapshot(1)))
    with pytest.raises(CheckpointError, match=r"step-000000003\.json is damaged"):
        HealState.resume(out)
