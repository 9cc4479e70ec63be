"""Weights that stay in their files."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimrank.model import copy_of, is_mapped, let_go, map_parameters


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=draw),
        "b": torch.randn(200, 64, generator=draw).bfloat16(),
        "c": torch.empty(0),
        "d": torch.arange(7, dtype=torch.int32),
        "e": torch.tensor(2.5, dtype=torch.float64),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


class Held(nn.Module):
    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


def test_mapped_tensors_are_those_of_the_file(file, tensors):
    found = map_parameters(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


def test_they_are_the_same_after_they_were_let_go(file, tensors):
    held = Held(**map_parameters(file))
    before = held.b.sum()
    let_go(held)
    assert held.b.sum() == before
    assert all(torch.equal(getattr(held, name), tensor) for name, tensor in tensors.items())


def test_what_is_written_stays_in_memory_and_out_of_the_file(file, tensors):
    held = Held(**map_parameters(file))
    with torch.no_grad():
        held.b.zero_()
    let_go(held)
    assert not held.b.any()
    assert torch.equal(map_parameters(file)["b"], tensors["b"])


def test_a_neighbour_that_was_written_to_keeps_its_numbers(tmp_path):
    numbers = {"a": torch.ones(3000), "b": torch.ones(3000)}  # they share a page
    save_file(numbers, tmp_path / "two.safetensors")
    held = Held(**map_parameters(tmp_path / "two.safetensors"))
    with torch.no_grad():
        held.b.fill_(7)
    let_go(held)
    assert (held.b == 7).all()
    assert (held.a == 1).all()


def test_copies_are_in_memory_unless_they_share(file):
    held = Held(**map_parameters(file))
    assert is_mapped(held)
    assert not is_mapped(copy.deepcopy(held))
    assert copy_of(held).b is held.b
    linear = nn.Linear(2, 2)
    assert not is_mapped(linear)
    assert copy_of(linear).weight is not linear.weight


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory by file is told by Linux only")
def test_memory_comes_back(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    save_file({"a": torch.ones(2**24)}, tmp_path / "large.safetensors")  # 64 MiB
    held = Held(**map_parameters(tmp_path / "large.safetensors"))
    before = resident()
    held.a.sum()
    touched = resident()
    let_go(held)
    assert touched - before > 60_000
    assert resident() - before < 4_000
