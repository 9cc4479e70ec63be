import pytest
import torch
from torch import nn

from slimrank.calibration.hooks import inputs_of, taking_inputs
from slimrank.errors import NumericalError


@pytest.fixture
def chain():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))


def test_each_taker_gets_what_its_linear_gets(chain):
    seen = {}
    takers = {name: lambda x, name=name: seen.setdefault(name, x) for name in ("0", "1.0")}
    inputs = torch.ones(5, 2)
    with taking_inputs(chain, takers):
        chain(inputs)
    assert seen["0"] is inputs
    assert torch.equal(seen["1.0"], chain[0](inputs))


def test_only_these_hooks_go_and_they_go_even_after_an_error(chain):
    calls = []
    chain[0].register_forward_pre_hook(lambda _m, _a: calls.append("own"))

    def refuse(_inputs):
        raise NumericalError("no")

    with pytest.raises(NumericalError), taking_inputs(chain, {"0": refuse}):
        chain(torch.ones(5, 2))
    chain(torch.ones(5, 2))
    assert calls == ["own", "own"]


def test_only_numerical_errors_are_named():
    with pytest.raises(NumericalError, match=r"^the inputs of up: 1 is NaN$"), inputs_of("up"):
        raise NumericalError("1 is NaN")
    with pytest.raises(KeyError, match=r"^'other'$"), inputs_of("up"):
        raise KeyError("other")
