"""What stands behind a block gives what the model gives, and gradients leave nothing in it."""

import pytest
import torch

from slimrank import TokenWindows
from slimrank.calibration import (
    FINAL,
    ORIGINAL,
    ActivationStore,
    RestOfModel,
    embed_streams,
    keep_final,
    stacked,
)
from slimrank.model import discover
from tolerances import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
LENGTHS = (9, 24, 9, 24, 24)


def embedded(model, lengths=LENGTHS, size=3):
    """Windows, anatomy and streams in front of the first block, with the final states kept."""
    generator = torch.Generator().manual_seed(3)
    ids = tuple(torch.randint(4, 96, (length,), generator=generator) for length in lengths)
    anatomy = discover(model, torch.arange(12)[None])
    streams = embed_streams(
        model, anatomy, TokenWindows(ids[:-1]), TokenWindows(ids[-1:]), size, ActivationStore()
    )
    keep_final(model, anatomy, streams)
    return ids, anatomy, streams


def dtype_of(family, tiny):
    """Torch's grouped product knows no float64."""
    return torch.float32 if family in tiny.FUSED else torch.float64


def assert_close(found, wanted):
    """Within a forward and a backward."""
    assert found.shape == wanted.shape
    assert wanted.norm() > 0
    bound = 10 * TOLERANCE["forward", wanted.dtype]
    assert (found - wanted).norm() <= bound * wanted.norm()


def test_the_model_from_any_block_on(family, make_model, tiny):
    model = make_model(family, dtype=dtype_of(family, tiny))
    ids, anatomy, streams = embedded(model)
    blocks = list(model.get_submodule(anatomy.path).children())
    for numbers in ([1, 3, 4], [2]):
        rest = RestOfModel(model, anatomy, streams, 0)
        whole = model(input_ids=torch.stack([ids[n] for n in numbers]), use_cache=False).logits
        args, kwargs = streams.call(0, numbers)
        output = blocks[0](stacked(streams.store, (ORIGINAL,), numbers), *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        states = rest.states(hidden, numbers)
        assert_close(rest.logits(states), whole)
        assert_close(rest.logits(rest.wanted(numbers)), whole)
        assert_close(rest.wanted(numbers), states)
        last = RestOfModel(model, anatomy, streams, len(blocks) - 1)
        assert last.states(states, numbers) is states


def test_gradients_are_those_of_the_whole_model(family, make_model, tiny):
    model = make_model(family, dtype=dtype_of(family, tiny))
    ids, anatomy, streams = embedded(model)
    numbers = [1, 3]
    given = []

    def probe(_m, _a, output):
        states = output[0] if isinstance(output, tuple) else output
        given.append(states)
        states.retain_grad()

    block = next(model.get_submodule(anatomy.path).children())
    handle = block.register_forward_hook(probe)
    logits = model(input_ids=torch.stack([ids[n] for n in numbers]), use_cache=False).logits
    handle.remove()
    logits.square().sum().backward()
    model.zero_grad()
    hidden = given[0].detach().requires_grad_()
    rest = RestOfModel(model, anatomy, streams, 0)
    rest.logits(rest.states(hidden, numbers)).square().sum().backward()
    assert_close(hidden.grad, given[0].grad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flags_are_as_before(make_model):
    model = make_model("llama")
    model.model.norm.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    _, anatomy, streams = embedded(model)
    rest = RestOfModel(model, anatomy, streams, 0)
    hidden = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    states = rest.states(hidden, [1])
    assert states.requires_grad
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    with pytest.raises(RuntimeError):
        rest.states(hidden[..., :5], [1])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_final_states_are_the_streams_own_bits(make_model, dtype):
    """So a run that is resumed trains towards what the unbroken one did."""
    model = make_model("llama", dtype=dtype)
    _, anatomy, streams = embedded(model)
    blocks = list(model.get_submodule(anatomy.path).children())
    for numbers in streams.walk():
        hidden = stacked(streams.store, (ORIGINAL,), numbers)
        for index, block in enumerate(blocks):
            args, kwargs = streams.call(index, numbers)
            with torch.no_grad():
                hidden = block(hidden, *args, **kwargs)
        assert torch.equal(stacked(streams.store, (FINAL,), numbers), hidden)
        assert hidden.dtype == dtype
