"""Both streams of a block against whole forwards of two models, token for token."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from slimrank import LowRankLinear, TokenWindows
from slimrank.calibration import (
    ARRIVED,
    INPUT,
    ORIGINAL,
    SHIFTED,
    TARGET,
    ActivationStore,
    BlockPair,
    call_levels,
    collect_moments,
    embed_batches,
    embed_streams,
    pass_level,
    pass_original,
    pass_shifted,
    shifted,
    stacked,
    step_forward,
)
from slimrank.errors import ModelError, NumericalError
from slimrank.linalg import Factors
from slimrank.methods import METHODS
from slimrank.model import InputGroup, discover, replace_linear
from tiny.models import FUSED
from tolerances import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")

ONE, SHIFT, BOTH = (METHODS[name].needs for name in ("svd-llm", "shift-aware", "aa-svd"))
MOMENT = TOLERANCE["moment", torch.float64]
SINGLE = 4 * TOLERANCE["unit", torch.float32]  # norms and softmax of most models round to float32
CLOSE = TOLERANCE["forward", torch.float32]


def halved(linear):
    """The linear at half its rank."""
    left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    rank = len(values) // 2
    return LowRankLinear.from_factors(
        linear, Factors(left=left[:, :rank] * values[:rank], right=right[:rank])
    )


def shaken(linear):
    """A linear of the same size whose weight is another."""
    moved = copy.deepcopy(linear)
    moved.weight.data = moved.weight.data.roll(1, 0)
    return moved


def double(make_model, family):
    """A model in float64; of the experts' implementations only one runs in it."""
    fused = {"experts_implementation": "eager"} if family in FUSED else {}
    return make_model(family, dtype=torch.float64, **fused)


def pair_of(model, anatomy, index):
    path = f"{anatomy.path}.{index}"
    module = model.get_submodule(path)
    return BlockPair(index, path, copy.deepcopy(module), module)


class Run:
    """A model whose blocks are taken one after the other, as a sequential run takes them."""

    def __init__(self, model, windows, held_out=None, size=3, store=None, replace=halved):
        self.model, self.windows, self.replace = model, windows, replace
        self.dense = copy.deepcopy(model)
        self.anatomy = discover(model, torch.arange(12)[None])
        store = ActivationStore() if store is None else store
        self.streams = embed_streams(model, self.anatomy, windows, held_out, size, store)

    def solve(self, index, needs, look=lambda level: None):
        """All passes of a block; what was found, by linear."""
        pair, groups = pair_of(self.model, self.anatomy, index), self.anatomy.groups[index]
        shown = pass_original(pair, groups, needs, self.streams)
        found, solved = {n: sums.results() for n, sums in shown.sums.items()}, []
        names = [site.name for group in groups for site in group.sites]
        for level in call_levels(pair.path, groups):
            look(level)
            if "shifted" in needs:
                pending = [name for name in names if name not in solved]
                sums = pass_level(pair, level, solved, pending, needs, self.streams)
                found |= {name: group_sums.results() for name, group_sums in sums.items()}
            for site in (site for group in level for site in group.sites):
                if self.replace is not None:
                    linear = self.model.get_submodule(site.name)
                    replace_linear(self.model, site.name, self.replace(linear))
                solved.append(site.name)
        return pair, shown, found, pass_shifted(pair, solved, self.streams)


@torch.no_grad()
def inputs_of(model, names, windows):
    """What arrives at linears in one forward on all windows: (sequence, token, feature)."""
    seen, handles = {}, []
    for name in names:

        def hook(_m, args, name=name):
            seen[name] = args[0].detach().clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    model(input_ids=torch.stack(windows.windows), use_cache=False)
    for handle in handles:
        handle.remove()
    shape = (len(windows.windows), len(windows.windows[0]))
    return {
        name: x.reshape(*shape, -1) if x.shape[:-1].numel() == shape[0] * shape[1] else x
        for name, x in seen.items()
    }


@torch.no_grad()
def states_of(model, anatomy, window):
    """Input of each block and output of the last, of a window alone."""
    ends = []
    block = list(model.get_submodule(anatomy.path))[-1]
    handle = block.register_forward_hook(lambda _m, _a, output: ends.append(output))
    states = model(window[None], use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    end = ends[0][0] if isinstance(ends[0], tuple) else ends[0]
    return [state[0] for state in (*states[:-1], end)]


def mean_product(left, right):
    left, right = (x.reshape(-1, x.shape[-1]).double() for x in (left, right))
    return left.mT @ right / len(left)


def assert_near(found, wanted, bound):
    """To the mean of |x_i x_j|, as rounding of sums is."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def assert_untouched(*modules):
    for module in (m for root in modules for m in root.modules()):
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# nothing replaced


def test_nothing_replaced_is_no_error_and_the_models_own_states(family, make_model, make_windows):
    model = make_model(family)
    windows, held_out = make_windows(4, 24), make_windows(3, 20, seed=1)
    run = Run(model, windows, held_out, replace=None)
    known = [states_of(run.dense, run.anatomy, w) for w in (*windows.windows, *held_out.windows)]
    for index in range(2):
        pair, shown, found, errors = run.solve(index, BOTH)
        for error in errors:
            assert error.relative_error == 0.0
            assert error.cosine_distance <= 1e-6
        assert all(total.drift is None for total, _ in found.values())
        step_forward(run.streams)
        for number, states in enumerate(known):
            original = run.streams.store.get((ORIGINAL, number))
            assert torch.equal(run.streams.store.get((SHIFTED, number)), original)
            assert (original - states[index + 1]).norm() <= CLOSE * states[index + 1].norm()
        assert_untouched(pair.original, pair.compressed)
        assert shown.energies.keys() == {s.name for g in run.anatomy.groups[index] for s in g.sites}


# against whole forwards


def test_the_original_pass_gives_the_moments_of_a_plain_run(family, make_model, windows):
    model = double(make_model, family)
    run = Run(model, windows)
    batches = embed_batches(model, run.anatomy, windows, 3)
    for index, block in enumerate(model.get_submodule(run.anatomy.path)):
        groups = run.anatomy.groups[index]
        moments = collect_moments(model, block, index, groups, batches)
        shown = pass_original(pair_of(model, run.anatomy, index), groups, ONE, run.streams)
        assert list(shown.sums) == [group.sites[0].name for group in groups]
        assert shown.energies == {}
        for sums, total, last in zip(shown.sums.values(), moments.total, moments.last, strict=True):
            found, found_last = sums.results()
            last = last.moments()
            assert (found.tokens, found_last.tokens) == (total.tokens, last.tokens) == (192, 24)
            assert_near(found.original, total.original, MOMENT)
            assert_near(found_last.original, last.original, MOMENT)
            assert found.shifted is None
        pass_shifted(pair_of(model, run.anatomy, index), (), run.streams)
        step_forward(run.streams)


@pytest.mark.parametrize("needs", [BOTH, SHIFT], ids=["both", "shifted"])
def test_moments_and_drift_are_those_of_two_whole_models(family, make_model, windows, needs):
    """Blocks before and linears of this block are replaced; all tokens at once, in float64."""
    run = Run(double(make_model, family), windows)
    exact = MOMENT if family == "opt" else SINGLE
    for index in range(2):
        arriving, original = {}, {}

        def look(level, arriving=arriving, original=original):
            names = [group.sites[0].name for group in level]
            arriving |= inputs_of(run.model, names, windows)
            original |= inputs_of(run.dense, names, windows)

        _, _, found, _ = run.solve(index, needs, look)
        assert found.keys() == arriving.keys()
        for name, (total, last) in found.items():
            z, x = arriving[name], original[name]
            assert (total.tokens, last.tokens, total.original) == (192, 24, None)
            assert_near(total.shifted, mean_product(z, z), exact)
            assert_near(last.shifted, mean_product(z[-1], z[-1]), exact)
            if needs == SHIFT or torch.equal(x, z):
                assert total.drift is None
                assert needs == SHIFT or index == 0
                continue
            assert_near(total.shifted + total.drift, mean_product(x, z), exact)
            assert_near(last.shifted + last.drift, mean_product(x[-1], z[-1]), exact)
            assert_near(total.drift, mean_product(x - z, z), 10 * exact)  # of a difference
            assert total.drift.abs().max() > 1e-2 * total.shifted.abs().max()
        step_forward(run.streams)


def test_energies_rows_and_errors_are_those_of_two_whole_models(family, make_model, make_windows):
    """Energies leave the bias out; held-out sequences count in errors only."""
    windows, held_out = make_windows(7, 24), make_windows(4, 24, seed=1)
    run = Run(double(make_model, family), windows, held_out)
    every = TokenWindows((*windows.windows, *held_out.windows))
    for index in range(2):
        arriving = {}

        def look(level, arriving=arriving):
            arriving |= inputs_of(run.model, [group.sites[0].name for group in level], windows)

        _, shown, _, errors = run.solve(index, BOTH, look)
        sites = [site for group in run.anatomy.groups[index] for site in group.sites]
        original = inputs_of(run.dense, [site.name for site in sites], windows)
        for site in sites:
            weight = run.dense.get_submodule(site.name).weight.detach()
            outputs = original[site.name] @ weight.mT
            energy = float(outputs.square().sum() / 168)
            assert shown.energies[site.name] == pytest.approx(energy, rel=SINGLE)
        for name, z in arriving.items():
            for kind, wanted in ((INPUT, original[name]), (ARRIVED, z)):
                assert_near(run.streams.store.get((kind, name, 6)), wanted[-1], SINGLE)
        assert all((ARRIVED, name, 5) not in run.streams.store for name in arriving)
        states = [
            torch.stack(
                [states_of(copy.deepcopy(m), run.anatomy, w)[index + 1] for w in every.windows]
            )
            for m in (run.dense, run.model)
        ]
        for error, part in zip(errors, (slice(7), slice(7, None)), strict=True):
            x, z = (state[part] for state in states)
            relative = float((x - z).square().sum() / x.square().sum())
            distance = float(1 - torch.cosine_similarity(x, z, dim=-1).mean())
            assert relative > 1e-3
            assert error.relative_error == pytest.approx(relative, rel=CLOSE)
            assert error.cosine_distance == pytest.approx(distance, rel=CLOSE)
        step_forward(run.streams)
        for kind, wanted in zip((ORIGINAL, SHIFTED), states, strict=True):
            assert_near(stacked(run.streams.store, (kind,), list(range(11))), wanted, SINGLE)


def test_a_step_forward_keeps_two_streams_and_nothing_else(make_model, windows):
    run = Run(make_model("llama"), windows)
    bytes_before = run.streams.store.bytes_in_memory
    run.solve(0, BOTH)
    assert run.streams.store.bytes_in_memory > 2 * bytes_before
    assert (TARGET, 0) in run.streams.store
    step_forward(run.streams)
    assert run.streams.store.bytes_in_memory == bytes_before
    assert (TARGET, 0) not in run.streams.store


# outputs that are given again


def passed(run, needs):
    """Everything that the passes of all blocks came to."""
    every = []
    for index in range(2):
        _, shown, found, errors = run.solve(index, needs)
        every.append((found, shown.energies, errors))
        step_forward(run.streams)
    states = stacked(run.streams.store, (SHIFTED,), list(range(8)))
    return every, states


def assert_same_bits(left, right):
    for (found, *others), (again, *others_again) in zip(left[0], right[0], strict=True):
        assert others == others_again
        assert found.keys() == again.keys()
        for name in found:
            for one, other in zip(found[name], again[name], strict=True):
                assert torch.equal(one.shifted, other.shifted)
                assert (one.drift is None) == (other.drift is None)
                assert one.drift is None or torch.equal(one.drift, other.drift)
    assert torch.equal(left[1], right[1])


def test_what_is_given_again_gives_the_same_bits(family, make_model, windows, monkeypatch):
    given_again = passed(Run(make_model(family), windows), BOTH)
    monkeypatch.setattr(shifted, "_finished", lambda *_: {})
    assert_same_bits(given_again, passed(Run(make_model(family), windows), BOTH))


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_store_on_disk_gives_the_same_bits(family, make_model, windows, tmp_path):
    held = passed(Run(make_model(family), windows), BOTH)
    with ActivationStore(0, tmp_path) as store:
        assert_same_bits(held, passed(Run(make_model(family), windows, store=store), BOTH))
        assert store.bytes_in_memory == 0
    assert list(tmp_path.iterdir()) == []


class Overwriting(LlamaDecoderLayer):
    """A block that leaves zeros in the hidden states that it is given."""

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states.clone(), *args, **kwargs)
        hidden_states.zero_()
        return output


@pytest.mark.parametrize("needs", [SHIFT, BOTH], ids=["shifted", "both"])
def test_a_block_may_write_over_what_it_is_given(make_model, windows, needs):
    kept, overwritten = (Run(make_model("llama"), windows) for _ in range(2))
    for layer in overwritten.model.model.layers:
        layer.__class__ = Overwriting
    assert_same_bits(passed(kept, needs), passed(overwritten, needs))


@pytest.mark.parametrize("writes", [False, True])
def test_a_block_that_leaves_its_inputs_is_given_them_uncopied(make_model, windows, writes):
    run = Run(make_model("llama"), windows)
    if writes:
        run.model.model.layers[0].__class__ = Overwriting
    assert run.solve(0, BOTH)[0].leaves_inputs is not writes


def flops_of(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = call()
    return counter.get_total_flops(), result


def test_the_shifted_stream_costs_less_than_three_forwards(make_model, windows, monkeypatch):
    run = Run(make_model("llama"), windows, replace=shaken)
    call = run.streams.call(0, list(range(8)))
    hidden = stacked(run.streams.store, (ORIGINAL,), list(range(8)))
    block = run.model.model.layers[0]
    forward, _ = flops_of(lambda: block(hidden, *call[0], **call[1]))
    total, (pair, *_) = flops_of(lambda: run.solve(0, BOTH))
    original, _ = flops_of(lambda: pass_original(pair, run.anatomy.groups[0], BOTH, run.streams))
    assert original == forward
    assert forward < total - original < 3 * forward
    monkeypatch.setattr(shifted, "_finished", lambda *_: {})
    again, _ = flops_of(lambda: Run(run.dense, windows, replace=shaken).solve(0, BOTH))
    assert again - total > forward / 4


def test_each_module_runs_as_seldom_as_it_can(make_model, make_windows):
    """Each linear of the shifted stream once, and so it is for held-out text."""
    run = Run(make_model("llama"), make_windows(8), make_windows(3, 24, seed=1), replace=None)
    counts = {}
    block = run.model.model.layers[0]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):

        def hook(_m, _a, output, name=name):
            counts[name] = counts.get(name, 0) + len(output)

        block.get_submodule(name).register_forward_hook(hook)
    run.solve(0, BOTH)
    original, held_out = 11, 3  # the copy that is the original block carries the same hooks
    assert {name: count - original - held_out for name, count in counts.items()} == {
        "self_attn.q_proj": 8,
        "self_attn.o_proj": 8,
        "mlp.gate_proj": 8,
        "mlp.down_proj": 8,
    }


def test_a_block_that_has_changed_runs_as_a_whole(make_model, windows):
    """As after training: what was given before is not given again."""
    run = Run(make_model("llama"), windows)
    pair, *_, before = run.solve(0, BOTH)
    pair.compressed.input_layernorm.weight.data *= 1.5
    after = pass_shifted(pair, (), run.streams)
    assert after[0].relative_error > 1.01 * before[0].relative_error
    step_forward(run.streams)
    wanted = torch.stack([states_of(run.model, run.anatomy, w)[1] for w in windows.windows])
    assert_near(stacked(run.streams.store, (SHIFTED,), list(range(8))), wanted, CLOSE)


# experts


def test_experts_are_one_level(make_experts_model, windows):
    run = Run(make_experts_model(), windows)
    for index in range(2):
        path = f"model.layers.{index}"
        levels = [
            sorted(site.name.removeprefix(path) for group in level for site in group.sites)
            for level in call_levels(path, run.anatomy.groups[index])
        ]
        assert levels == [
            [f".self_attn.{name}_proj" for name in "kqv"],
            [".self_attn.o_proj"],
            [f".mlp.experts.{n}.{name}_proj" for n in range(4) for name in ("gate", "up")],
            [f".mlp.experts.{n}.down_proj" for n in range(4)],
        ]


def test_an_expert_that_the_probe_missed_keeps_its_place(make_experts_model, windows):
    """Its linears are groups of their own, at the end; their level is that of the others."""
    run = Run(make_experts_model(), windows)
    path = "model.layers.0"
    groups = list(run.anatomy.groups[0])
    alone = [
        InputGroup((site,)) for group in groups[2:] for site in group.sites if ".1." in site.name
    ]
    rest = [g for g in groups if not any(".1." in site.name for site in g.sites[:1])]
    assert len(alone) == 3
    expected = [
        {site.name for group in level for site in group.sites}
        for level in call_levels(path, groups)
    ]
    found = [
        {site.name for group in level for site in group.sites}
        for level in call_levels(path, [*rest, *alone])
    ]
    assert found == expected


def test_experts_cannot_be_anchored(make_experts_model, windows):
    run = Run(make_experts_model(), windows)
    pair = pair_of(run.model, run.anatomy, 0)
    groups = run.anatomy.groups[0]
    said = r"model\.layers\.0\.mlp\.experts\.\d\.gate_proj receives \d+ of 72 tokens .*shift-aware"
    with pytest.raises(ModelError, match=said):
        pass_original(pair, groups, BOTH, run.streams)
    assert_untouched(pair.original, pair.compressed)
    kept = run.anatomy.only(s.name for s in run.anatomy.sites if "self_attn" in s.name)
    shown = pass_original(pair, kept.groups[0], BOTH, run.streams)
    assert len(shown.energies) == 4


@pytest.mark.parametrize("closed", [(), (1,)])
def test_shift_aware_sees_what_reaches_each_expert(make_experts_model, windows, closed):
    run = Run(make_experts_model(closed=closed), windows)
    for index in range(2):
        arriving = {}

        def look(level, arriving=arriving):
            arriving |= inputs_of(run.model, [group.sites[0].name for group in level], windows)

        _, _, found, _ = run.solve(index, SHIFT, look)
        unseen = {name for name, (total, _) in found.items() if total.tokens == 0}
        assert unseen == {name for name in found if any(f"experts.{n}." in name for n in closed)}
        assert all(not found[name][0].shifted.any() for name in unseen)
        assert arriving.keys() == found.keys() - unseen
        for name, z in arriving.items():
            total, last = found[name]
            assert total.tokens == z.shape[:-1].numel()
            assert_near(total.shifted, mean_product(z, z), CLOSE)
            rows = run.streams.store.get((ARRIVED, name, 7)) if last.tokens else z[:0]
            assert len(rows) == last.tokens
        step_forward(run.streams)
        wanted = torch.stack(
            [
                states_of(copy.deepcopy(run.model), run.anatomy, w)[index + 1]
                for w in windows.windows
            ]
        )
        assert_near(stacked(run.streams.store, (SHIFTED,), list(range(8))), wanted, CLOSE)


# what is left behind, and what goes wrong


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
@pytest.mark.parametrize("needs", [ONE, SHIFT, BOTH], ids=["original", "shifted", "both"])
def test_no_hook_is_left(family, make_model, windows, needs):
    run = Run(make_model(family), windows)
    pair, *_ = run.solve(0, needs)
    assert_untouched(run.model, pair.original, pair.compressed)


def own_forward(module, calls):
    """A forward of the user's own, as accelerate sets it on modules of a spread model."""
    original = module.forward

    def own(*args, **kwargs):
        calls.append(len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))
        return original(*args, **kwargs)

    module.forward = own
    return own


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_of_the_users_own_is_put_back(make_model, windows, fails):
    run = Run(make_model("llama"), windows)
    attention, calls = run.model.model.layers[0].self_attn, []
    own = own_forward(attention, calls)
    pair = pair_of(run.model, run.anatomy, 0)
    pair.original.self_attn.__dict__.pop("forward")
    groups = run.anatomy.groups[0]
    names = [site.name for group in groups for site in group.sites]
    solved, pending = names[:4], names[4:]
    pass_original(pair, groups, BOTH, run.streams)
    pass_level(pair, [groups[2]], solved, pending, BOTH, run.streams)
    assert sum(calls) == 8
    assert attention.__dict__["forward"] is own
    if fails:
        pair.compressed.mlp.gate_proj.weight.data.fill_(torch.nan)
        with pytest.raises(NumericalError, match=r"mlp\.down_proj"):
            pass_level(pair, [groups[3]], names[:6], names[6:], BOTH, run.streams)
    else:
        pass_level(pair, [groups[3]], names[:6], names[6:], BOTH, run.streams)
    assert sum(calls) == 8  # what it gave was given again
    assert attention.__dict__["forward"] is own
    del attention.forward
    assert_untouched(run.model, pair.original)


WHERE = [
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.down_proj"),
    ("input_layernorm", "self_attn.q_proj"),
]


@pytest.mark.parametrize(("where", "named"), WHERE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", ["original", "shifted"])
def test_activations_that_are_not_finite_name_their_linear(
    make_model, windows, stream, bad, where, named
):
    run = Run(make_model("llama"), windows)
    pair, groups = pair_of(run.model, run.anatomy, 1), run.anatomy.groups[1]
    module = pair.original if stream == "original" else pair.compressed
    module.get_submodule(where).weight.data.fill_(bad)
    said = rf"the inputs of model\.layers\.1\.{named}: \d+ of \d+ activations are NaN"
    passes = {
        "original": lambda: pass_original(pair, groups, ONE, run.streams),
        "shifted": lambda: pass_level(pair, groups, (), (), SHIFT, run.streams),
    }
    with pytest.raises(NumericalError, match=said):
        passes[stream]()
    assert_untouched(run.model, pair.original, pair.compressed)


@pytest.mark.parametrize("side", ["original", "compressed"])
def test_outputs_that_are_not_finite_name_their_block(make_model, windows, side):
    run = Run(make_model("llama"), windows)
    pair = pair_of(run.model, run.anatomy, 0)
    getattr(pair, side).mlp.down_proj.weight.data[0, 0] = torch.nan
    pass_original(pair, (), SHIFT, run.streams)
    with pytest.raises(NumericalError, match=r"the outputs of model\.layers\.0 are not finite"):
        pass_shifted(pair, (), run.streams)
    assert_untouched(run.model, pair.original)
