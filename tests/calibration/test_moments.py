"""Moments are those of what the linears receive, and are held against the tokens."""

import pytest
import torch

from slimrank import LowRankLinear, TokenWindows
from slimrank.calibration import (
    LastInputs,
    check_on_tokens,
    collect_moments,
    embed_batches,
    from_padded,
)
from slimrank.errors import NumericalError
from slimrank.linalg import Moments, decompose_outputs
from slimrank.model import discover

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


def anatomy_of(model):
    return discover(model, torch.arange(12)[None])


def walk(model, windows, batch_size=4, anatomy=None):
    """Moments of every linear, by name."""
    anatomy = anatomy or anatomy_of(model)
    batches = embed_batches(model, anatomy, windows, batch_size)
    found = {}
    for index, block in enumerate(model.get_submodule(anatomy.path)):
        groups = anatomy.groups[index]
        moments = collect_moments(model, block, index, groups, batches)
        for group, total in zip(groups, moments.total, strict=True):
            found |= {site.name: total for site in group.sites}
    return found


@torch.no_grad()
def captured(model, windows):
    """The same from plain hooks and whole forwards, one window at a time, in float64."""
    sums, counts, handles = {}, {}, []
    for site in anatomy_of(model).sites:

        def hook(_module, args, name=site.name):
            tokens = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + tokens.mT @ tokens
            counts[name] = counts.get(name, 0) + len(tokens)

        handles.append(model.get_submodule(site.name).register_forward_pre_hook(hook))
    for window in windows.windows:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: Moments(total / counts[name], counts[name]) for name, total in sums.items()}


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, moments in found.items():
        assert moments.tokens == expected[name].tokens, name
        gap = (moments.original - expected[name].original).abs().max()
        assert gap <= rtol * expected[name].original.abs().max(), name


@pytest.mark.parametrize("batch_size", [3])
def test_moments_are_those_of_a_plain_forward(family, make_model, windows, batch_size):
    model = make_model(family)
    assert_same(walk(model, windows, batch_size), captured(model, windows))


def test_moments_of_listed_experts(make_experts_model, windows):
    model = make_experts_model(closed=(1,))
    found, expected = walk(model, windows), captured(model, windows)
    unseen = {name for name in found if name not in expected}
    assert {name.split(".experts.")[1].split(".")[0] for name in unseen} == {"1"}
    assert all(found[name].tokens == 0 and not found[name].original.any() for name in unseen)
    assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon", "opt"])
def test_a_padded_batch_gives_the_moments_of_its_texts_alone(family, make_model, side):
    model = make_model(family)
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(4, 96, (n,), generator=generator) for n in (30, 12, 21, 30)]
    ids, mask = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(30 - len(text), 30)
        ids[row, place], mask[row, place] = text, 1
    found = walk(model, from_padded(ids, mask))
    assert_same(found, captured(model, TokenWindows(tuple(texts))))


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_a_bias_is_not_in_its_own_moment(family, make_model, windows):
    """Changing the last linear's bias changes no moment: inputs are summed, not outputs."""
    model = make_model(family)
    before = walk(model, windows)
    name = next(reversed(before))
    linear = model.get_submodule(name)
    if linear.bias is None:
        linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    linear.bias.data += 100.0
    after = walk(model, windows)
    assert torch.equal(after[name].original, before[name].original)


def test_hidden_states_move_on_and_the_last_batch_is_kept_apart(make_model, windows):
    model = make_model("llama")
    anatomy = anatomy_of(model)
    batches = embed_batches(model, anatomy, windows, 3)
    before = list(batches)
    block = model.model.layers[0]
    moments = collect_moments(model, block, 0, anatomy.groups[0], batches)
    assert all(not torch.equal(a.hidden, b.hidden) for a, b in zip(before, batches, strict=True))
    last = before[-1].hidden.shape[0] * before[-1].hidden.shape[1]
    assert {m.moments().tokens for m in moments.last} == {last}
    assert {m.tokens for m in moments.total} == {windows.tokens}
    alone = [before[-1]]
    again = collect_moments(model, block, 0, anatomy.groups[0], alone)
    for left, right in zip(moments.last, again.total, strict=True):
        assert torch.equal(left.moments().original, right.original)


def test_hooks_are_removed(make_model, windows):
    model = make_model("llama")
    walk(model, windows)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.down_proj"),
        ("input_layernorm", "self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_linear(make_model, windows, where, named, bad):
    model = make_model("llama")
    anatomy = anatomy_of(model)
    batches = embed_batches(model, anatomy, windows, 3)
    block = model.model.layers[1]
    block.get_submodule(where).weight.data.fill_(bad)
    with pytest.raises(NumericalError, match=rf"the inputs of model\.layers\.1\.{named}: "):
        collect_moments(model, block, 1, anatomy.groups[1], batches)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def checked(make_model, windows):
    """A block, the batch in front of it, replacements, and the moments of that batch."""
    model = make_model("qwen2")
    anatomy = anatomy_of(model)
    batches = embed_batches(model, anatomy, windows, 3)
    entering = batches[-1]
    block = model.model.layers[0]
    moments = collect_moments(model, block, 0, anatomy.groups[0], batches)
    by_name = {
        site.name: last
        for group, last in zip(anatomy.groups[0], moments.last, strict=True)
        for site in group.sites
    }
    replacements = {}
    for name, moment in by_name.items():
        linear = model.get_submodule(name)
        factors = decompose_outputs(linear.weight, moment.moments().original).truncate(6)
        replacements[name] = LowRankLinear.from_factors(linear, factors)
    return model, block, entering, replacements, by_name


def test_right_moments_pass_the_check_on_tokens(checked):
    model, block, entering, replacements, moments = checked
    gaps = check_on_tokens(model, block, 0, entering, replacements, moments)
    assert gaps.keys() == replacements.keys()
    assert max(gaps.values()) < 1e-5
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


@pytest.mark.parametrize("wrong", ["scaled", "a token lost", "swapped"])
def test_wrong_moments_do_not(checked, wrong):
    model, block, entering, replacements, moments = checked
    name = "model.layers.0.mlp.up_proj"
    true = moments[name]
    if wrong == "scaled":
        false = LastInputs(true.features, [1.01 * inputs for inputs in true.inputs])
    elif wrong == "a token lost":
        false = LastInputs(true.features, [inputs[:, 1:] for inputs in true.inputs])
    else:
        false = moments["model.layers.0.self_attn.o_proj"]
    with pytest.raises(NumericalError, match=rf"{name}: the error on the tokens"):
        check_on_tokens(model, block, 0, entering, replacements, moments | {name: false})
    assert not any(m._forward_pre_hooks for m in model.modules())
