"""Running block by block gives what the model gives, for every family, sliding windows included."""

import pytest
import torch
from torch import nn

from slimrank import TokenWindows
from slimrank.calibration import ActivationStore, embed_batches, run_block
from slimrank.errors import ModelError
from slimrank.model import discover

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


def blocks_of(model, anatomy):
    return list(model.get_submodule(anatomy.path))


@torch.no_grad()
def states_of(model, anatomy, ids):
    """Input of each block, and output of the last, in a plain forward."""
    states = []
    blocks = blocks_of(model, anatomy)
    handles = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in blocks
    ]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


def assert_untouched(model, anatomy):
    for block in blocks_of(model, anatomy):
        assert "forward" not in block.__dict__
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


@pytest.mark.parametrize(("lengths", "batch_size"), [((24, 24, 24), 2), ((9, 40, 9), 1)])
def test_replay_equals_the_model(family, make_model, lengths, batch_size):
    model = make_model(family)
    anatomy = discover(model, torch.arange(12)[None])
    generator = torch.Generator().manual_seed(1)
    windows = TokenWindows(
        tuple(torch.randint(4, 96, (length,), generator=generator) for length in lengths)
    )
    batches = embed_batches(model, anatomy, windows, batch_size)
    expected = {}
    for window in windows.windows:
        states = states_of(model, anatomy, window[None])
        expected[len(states[0][0]), float(states[0].sum())] = states
    rows = 0
    for batch in batches:
        seen = [batch.hidden]
        for index, block in enumerate(blocks_of(model, anatomy)):
            batch = run_block(block, index, batch)
            seen.append(batch.hidden)
        for row in range(len(batch.hidden)):
            rows += 1
            key = next(
                k
                for k in expected
                if k[0] == len(seen[0][row]) and abs(k[1] - float(seen[0][row].sum())) < 1e-3
            )
            for found, wanted in zip(seen, expected[key], strict=True):
                torch.testing.assert_close(found[row], wanted[0], rtol=1e-4, atol=1e-5)
    assert rows == len(lengths)
    assert_untouched(model, anatomy)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_sliding_window_slides(family, make_model, make_windows):
    """Tokens over a window ago do not reach the first, sliding block: its mask is the model's."""
    model = make_model(family)
    anatomy = discover(model, torch.arange(12)[None])
    ids = make_windows(1, 40).windows[0]
    other = ids.clone()
    other[0] = 4 if ids[0] != 4 else 5
    block = blocks_of(model, anatomy)[0]
    ends = [
        run_block(block, 0, embed_batches(model, anatomy, TokenWindows((x,)), 1)[0]).hidden[0]
        for x in (ids, other)
    ]
    assert not torch.equal(ends[0][:16], ends[1][:16])
    assert torch.equal(ends[0][17:], ends[1][17:])


def test_arguments_are_shared_between_equal_batches(make_model, make_windows):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    batches = embed_batches(model, anatomy, make_windows(8, 24), 1)
    assert len(batches) == 8
    assert len({id(batch.calls) for batch in batches}) == 1


@pytest.mark.parametrize("limit", [None, 0, 2 * 3 * 24 * 32 * 4])
def test_hidden_states_wait_where_the_limit_says(limit, make_model, make_windows, tmp_path):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    plain = embed_batches(model, anatomy, make_windows(12, 24), 3)
    with ActivationStore(limit, tmp_path) as store:
        batches = embed_batches(model, anatomy, make_windows(12, 24), 3, store)
        assert [len(batch.hidden) for batch in batches] == [3, 3, 3, 2, 1]
        for number, batch in enumerate(plain):
            assert torch.equal(batches[number].hidden, batch.hidden)
        assert torch.equal(batches[-1].hidden, plain[4].hidden)
        left = {None: 0, 0: 5}.get(limit, 3)
        assert len(list(tmp_path.rglob("*.safetensors"))) == left
        with pytest.raises(IndexError):
            batches[5]
        batches.drop()
        assert (len(batches), store.bytes_in_memory, store.bytes_on_disk) == (0, 0, 0)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_what_stays_in_memory_is_not_copied(make_model, make_windows):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    batches = embed_batches(model, anatomy, make_windows(3, 24), 2)
    leaving = run_block(blocks_of(model, anatomy)[0], 0, batches[0])
    batches[0] = leaving
    assert batches[0].hidden.data_ptr() == leaving.hidden.data_ptr()


class Exchange(nn.Module):
    """A block that reads what the one before it left behind, beside the hidden states."""

    def __init__(self, block, shelf):
        super().__init__()
        self.block, self.shelf = block, shelf

    def forward(self, hidden_states, **kwargs):
        output = self.block(hidden_states, **kwargs)
        left = self.shelf.pop("left", 0.0)
        self.shelf["left"] = output.mean()
        return output + left


@pytest.mark.parametrize("trouble", ["exchange", "twice", "skipped"])
def test_a_model_whose_blocks_pass_more_than_states_is_refused(make_model, make_windows, trouble):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    layers, shelf = model.model.layers, {}
    if trouble == "exchange":
        # The second block of one forward leaves something for the first of the next.
        for number in range(2):
            layers[number] = Exchange(layers[number], shelf)
    elif trouble == "twice":
        run = layers[0].forward
        layers[0].register_forward_hook(lambda _m, args, out: run(out, **model.kwargs))
        layers[0].register_forward_pre_hook(
            lambda _m, args, kwargs: setattr(model, "kwargs", kwargs), with_kwargs=True
        )
        layers[1].register_forward_pre_hook(
            lambda _m, args, kwargs: ((layers[0](args[0], **kwargs),), kwargs), with_kwargs=True
        )
    else:
        model.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match="LlamaForCausalLM passes more than hidden states"):
        embed_batches(model, anatomy, make_windows(2, 24), 2)
    assert all("forward" not in block.__dict__ for block in layers)


def test_overrides_are_removed_when_the_model_fails(make_model, make_windows):
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError

    model.model.norm.forward = fail
    with pytest.raises(ZeroDivisionError):
        embed_batches(model, anatomy, make_windows(2, 24), 2)
    assert_untouched(model, anatomy)


def test_a_forward_of_the_users_own_is_put_back(make_model, make_windows):
    """As accelerate sets it on each module of a model that is spread over devices."""
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    block, calls = model.model.layers[0], []
    original = block.forward

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = own
    embed_batches(model, anatomy, make_windows(2, 24), 2)
    assert block.forward is own


def test_nan_weights_are_not_called_an_unsupported_model(make_model, make_windows):
    """A NaN is not a model that passes more than hidden states; the moments name its place."""
    model = make_model("llama")
    anatomy = discover(model, torch.arange(12)[None])
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    embed_batches(model, anatomy, make_windows(2, 24), 2)
