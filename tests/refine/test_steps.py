"""Steps that go on where others ended, and the best values so far."""

import pytest
import torch
from torch import nn

from slimrank.errors import NumericalError
from slimrank.recipe import HealRecipe
from slimrank.refine import Best, Steps, set_values

SETTINGS = HealRecipe(learning_rate=0.1, weight_decay=0.01)
TARGETS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def make(count=6):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))]

    def measure(batch):
        return (parameters[0] * batch + parameters[1] - 1).square().sum(), batch.numel()

    return parameters, Steps(parameters, measure, SETTINGS, count, 1.0, lambda n: f"step {n} fails")


def batches(step):
    return TARGETS[2 * step : 2 * step + 2].split(1)


def test_they_go_on_from_what_was_remembered():
    parameters, steps = make()
    for step in range(3):
        steps.take(batches(step))
    others, again = make()
    set_values(others, [parameter.detach() for parameter in parameters])
    again.go_on(3, {name: value.clone() for name, value in steps.moments().items()})
    assert again.done == 3
    for step in range(3, 6):
        assert steps.take(batches(step)) == again.take(batches(step))
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"0.exp_avg": torch.zeros(4)},
        {"0.more": torch.zeros(3)},
        {"7.step": torch.tensor(1.0)},
        {"x.step": torch.tensor(1.0)},
    ],
)
def test_what_other_parameters_remember_is_refused(change):
    _, steps = make()
    steps.take(batches(0))
    moments = steps.moments()
    with pytest.raises(ValueError, match=r"moments of parameter|invalid literal"):
        make()[1].go_on(1, {**moments, **change})


def test_a_parameter_without_a_gradient_has_no_memory():
    parameters, _ = make()
    steps = Steps(
        parameters, lambda x: (parameters[1].sum() * x.sum(), 1), SETTINGS, 2, 1.0, lambda _: ""
    )
    steps.take([torch.ones(1)])
    assert {name.partition(".")[0] for name in steps.moments()} == {"1"}
    assert torch.equal(parameters[0], torch.ones(3))


def test_a_fault_is_told_and_changes_nothing():
    parameters, steps = make()
    steps.take(batches(0))
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(NumericalError, match="step 2 fails"):
        steps.take([torch.tensor([[torch.nan] * 3])])
    assert steps.done == 1
    for one, other in zip(parameters, before, strict=True):
        assert torch.equal(one, other)


def test_the_best_is_what_it_was_and_equals_do_not_count():
    (parameter, _), _ = make()
    best = Best([parameter], 2.0)
    for number, loss, value in ((1, 1.0, 5.0), (2, 1.0, 6.0), (3, 3.0, 7.0)):
        parameter.data.fill_(value)
        best.is_improved(number, loss)
    assert (best.number, best.loss) == (1, 1.0)
    best.put_back()
    assert torch.equal(parameter, torch.full((3,), 5.0))
