"""One block backwards, where the gradients are written down; and the scale of float16."""

import pytest
import torch
from torch import nn

from slimrank.calibration.backward import loss_scale, pull_back
from tolerances import TOLERANCE

ALONE = ((), {})
EXACT = TOLERANCE["forward", torch.float64]


def linear(out_features, in_features, seed):
    module = nn.Linear(in_features, out_features).double()
    for parameter in module.parameters():
        parameter.data = states(*parameter.shape, seed=seed)
    return module


def states(*shape, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_a_chain_of_two():
    """At the second it is what was given, at the first and at the input what the weights make."""
    block, given = nn.Sequential(linear(4, 6, 1), linear(6, 4, 2)), states(2, 5, 6, seed=1)
    found = pull_back(block, ["0", "1"], states(2, 5, 6), ALONE, given, with_inputs=True)
    first, second = block[0].weight.detach(), block[1].weight.detach()
    assert torch.equal(found.outputs["1"][0], given)
    torch.testing.assert_close(found.outputs["0"][0], given @ second, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.entering, given @ second @ first, rtol=EXACT, atol=EXACT)
    assert torch.equal(found.inputs["0"][0], states(2, 5, 6))
    torch.testing.assert_close(found.inputs["1"][0], block[0](states(2, 5, 6)).detach())


def test_outputs_that_go_nowhere_are_left_out_with_their_inputs():
    """It runs twice, and only the second time counts."""

    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.it = linear(6, 6, 1)

        def forward(self, hidden_states):
            self.it(hidden_states)
            return self.it(2 * hidden_states), None

    found = pull_back(
        Wasteful(), ["it"], states(2, 5, 6), ALONE, states(2, 5, 6, seed=1), with_inputs=True
    )
    assert [len(calls) for calls in (*found.outputs.values(), *found.inputs.values())] == [1, 1]
    assert torch.equal(found.inputs["it"][0], 2 * states(2, 5, 6))


def test_a_block_that_changes_its_input_in_place():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.it = linear(6, 6, 1)

        def forward(self, hidden_states):
            return self.it(hidden_states.mul_(2))

    block, inputs, given = Doubled(), states(2, 5, 6), states(2, 5, 6, seed=1)
    found = pull_back(block, ["it"], inputs, ALONE, given)
    assert torch.equal(inputs, states(2, 5, 6))
    wanted = 2 * given @ block.it.weight.detach()
    torch.testing.assert_close(found.entering, wanted, rtol=EXACT, atol=EXACT)
    assert found.inputs == {}


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-20, 1.0, 2.0**30])
def test_float16_at_any_size(size):
    """Gradients far outside the range of float16 come back as they are."""
    block = nn.Linear(6, 6, bias=False).half()
    block.weight.data = torch.eye(6).half()
    given = (size * states(2, 5, 6)).float()
    found = pull_back(block, [""], states(2, 5, 6).half(), ALONE, given)
    assert found.entering.dtype == torch.float32
    assert (found.entering - given).norm() <= TOLERANCE["forward", torch.float16] * given.norm()


@pytest.mark.parametrize("peak", [1e-30, 0.3, 0.5, 1.0, 7.0, 1e20])
def test_the_scale_is_a_power_of_two(peak):
    scale = loss_scale(torch.float16, peak)
    assert 2**7 <= peak * scale < 2**8
    assert torch.tensor(scale, dtype=torch.float64).frexp().mantissa == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes_are_not_scaled(dtype):
    assert loss_scale(dtype, 1e-30) == 1.0


@pytest.mark.parametrize("peak", [0.0, float("inf"), float("nan")])
def test_nothing_to_scale(peak):
    assert loss_scale(torch.float16, peak) == 1.0
