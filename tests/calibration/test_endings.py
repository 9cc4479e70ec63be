"""A child ends in a linear only if it gives the very tensor that the linear gave."""

import pytest
import torch
from torch import nn

from slimrank.calibration.endings import Ending, noting_endings


class Child(nn.Module):
    """Two linears, and something done to what the second gives."""

    def __init__(self, finish):
        super().__init__()
        self.up, self.down, self.finish = nn.Linear(4, 6), nn.Linear(6, 4), finish

    def forward(self, x):
        return self.finish(self.down(self.up(x)))


class Block(nn.Module):
    def __init__(self, finish, times=1):
        super().__init__()
        self.child, self.alone, self.times = Child(finish), nn.Linear(4, 4), times

    def forward(self, x):
        for _ in range(self.times):
            output = self.child(x)
            x = x + (output[0] if isinstance(output, tuple) else output)
        return self.alone(x)


NAMES = ("child.up", "child.down", "alone")


def noted(block, batches=1):
    endings = {}
    with torch.no_grad():
        for _ in range(batches):
            with noting_endings(block, NAMES, endings):
                block(torch.ones(3, 4))
    assert not any(m._forward_hooks for m in block.modules())
    return endings


@pytest.mark.parametrize(
    ("finish", "items"),
    [
        (lambda y: y, 0),
        (nn.Dropout(0.5).eval(), 0),
        (lambda y: (y,), 1),
        (lambda y: (y, None), 2),
    ],
)
def test_the_very_tensor_is_an_ending(finish, items):
    assert noted(Block(finish), batches=2) == {"child": Ending("child.down", items)}


@pytest.mark.parametrize(
    "finish",
    [
        lambda y: y + 0,
        lambda y: y.mul_(2),
        lambda y: y.view(3, 4),
        lambda y: (y, y),
        lambda y: y.clone(),
    ],
)
def test_what_is_done_to_it_is_none(finish):
    assert noted(Block(finish)) == {"child": None}


def test_a_child_that_runs_twice_ends_in_none():
    assert noted(Block(lambda y: y, times=2)) == {"child": None}


def test_one_batch_that_differs_settles_it():
    turns = iter([True, False, True])
    assert noted(Block(lambda y: y if next(turns) else y + 0), batches=3) == {"child": None}


def test_a_last_linear_that_nobody_asked_for_is_none():
    block, endings = Block(lambda y: y), {}
    with noting_endings(block, ["child.up"], endings):
        block(torch.ones(3, 4))
    assert endings == {"child": None}


def test_tensors_without_a_version_are_none():
    block, endings = Block(lambda y: y), {}
    with torch.inference_mode(), noting_endings(block, NAMES, endings):
        block(torch.ones(3, 4))
    assert endings == {"child": None}
