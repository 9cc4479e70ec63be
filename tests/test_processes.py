"""What processes that share a run tell one another."""

import os

import pytest
import torch
from typer.testing import CliRunner

from slimrank import processes
from slimrank.cli import app
from slimrank.errors import ModelError, ProcessError
from tiny.together import ended_together, run_together

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool]


def test_alone_nothing_is_sent():
    assert (processes.number(), processes.count(), processes.is_first()) == (0, 1, True)
    tensor = torch.ones(2)
    assert processes.add_up(tensor) is tensor
    processes.wait()
    assert processes.agreed(True)
    assert processes.own_device("cuda:3") == "cuda:3"


def test_sums_and_largest_are_of_all(tmp_path):
    def do(number):
        assert (processes.number(), processes.count()) == (number, 3)
        assert processes.is_first() == (number == 0)
        assert processes.share("abcde") == [["a", "d"], ["b", "e"], ["c"]][number]
        assert processes.sums(number, 0.5) == [3.0, 1.5]
        assert processes.largest([number, -number, 0.1]) == [2.0, 0.0, 0.1]
        assert processes.gathered(number, 7) == [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]
        whole = torch.full((2, 3), 1.0 + number)
        assert processes.add_up(whole) is whole
        assert torch.equal(whole, torch.full((2, 3), 6.0))
        strided = torch.full((3, 2), 1.0 + number).mT
        assert torch.equal(processes.add_up(strided), torch.full((2, 3), 6.0))

    run_together(3, tmp_path, do)


def test_what_one_has_goes_round_bit_for_bit(tmp_path):
    sent = {str(dtype): torch.arange(6).view(2, 3).to(dtype).mT for dtype in DTYPES}
    sent |= {"none": torch.empty(0, 4), "number": torch.tensor(1 / 3)}

    def do(number):
        text, found = processes.hand_round(f"told by {number}: é", sent if number == 1 else None, 1)
        assert text == "told by 1: é"
        assert found.keys() == sent.keys()
        for name, tensor in sent.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
        assert processes.agreed(number == 0)
        assert not processes.agreed(number == 1)
        own = [torch.full((2,), float(number)), torch.full((1,), 5.0 + number)]
        processes.equalise(own)
        assert [tensor.tolist() for tensor in own] == [[0.0, 0.0], [5.0]]

    run_together(2, tmp_path, do)


def test_only_the_first_does_what_is_done_alone(tmp_path):
    def do(number):
        processes.alone((tmp_path / f"done by {number}").touch)
        assert [path.name for path in tmp_path.glob("done*")] == ["done by 0"]

    run_together(2, tmp_path, do)


def test_each_process_has_its_own_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def do(number):
        os.environ["LOCAL_RANK"] = str(2 + number)
        assert processes.own_device(None) is None
        assert processes.own_device("cpu") == "cpu"
        with pytest.raises(ModelError, match="2 processes cannot share cuda:0"):
            processes.own_device("cuda:0")
        assert processes.own_device("cuda") == f"cuda:{number}"

    run_together(2, tmp_path, do)


def test_a_group_of_the_callers_is_joined_by_one_of_our_own(tmp_path):
    def do(number):
        for _ in range(2):
            processes.join()
            assert processes.sums(number) == [1.0]
        assert len(processes._GROUPS) == 1

    run_together(2, tmp_path, do)


def test_who_has_something_else_than_the_first_is_told(tmp_path):
    def do(number):
        values = {"recipe": "same", "model": str(number)}
        if number == 0:
            processes.require_same(values)
        else:
            with pytest.raises(ProcessError, match="another model than the first one"):
                processes.require_same(values)

    run_together(2, tmp_path, do)


def test_one_that_ends_is_told_by_the_others(tmp_path):
    def do(number):
        if number == 1:
            raise SystemExit
        processes.wait()

    codes, told = ended_together(2, tmp_path, do)
    assert codes == [1, 1]
    assert "slimrank.errors.ProcessError: another process has ended" in told


def test_what_torchrun_says_counts_before_they_have_joined(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    assert processes.to_be() == (0, 1)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert processes.to_be() == (1, 3)


@pytest.mark.parametrize("command", ["plan", "inspect", "evaluate"])
def test_what_cannot_be_shared_says_so(command, monkeypatch, tmp_path):
    for name in processes.OF_TORCHRUN:
        monkeypatch.setenv(name, "2")
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 1
    line = "error: process 2 of 2: only compress and profile can be shared by processes; run this"
    assert line in result.stderr
