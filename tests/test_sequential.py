"""Blocks one after the other: every method on every family, training, and what is put back."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file

import slimrank
from slimrank import CompressionOptions, LowRankLinear, TokenWindows, compress
from slimrank.calibration import hold_out
from slimrank.errors import (
    CheckpointError,
    ModelError,
    NumericalError,
    NumericalWarning,
    RecipeError,
)
from slimrank.methods import METHODS
from slimrank.model import block_path, list_sites
from tiny.models import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning"),
    pytest.mark.filterwarnings("ignore:uniform ranks do better:slimrank.errors.NumericalWarning"),
]
FIXED_WEIGHT = {"importance_weight": 0.5}
STREAMS = {"original", "shifted"}
EVERY = [  # each method somewhere, and everywhere two that take the most different ways
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if family in ("llama", "phi3") or method in ("aa-svd", "kfac-svd")
]
ROUNDING = 1e-3  # of float32 factors and sums of tokens that were batched otherwise


@pytest.fixture(scope="module")
def text(make_windows):
    """Sixteen windows to calibrate on and eight that are held out, of 32 tokens."""
    return make_windows(24, 32)


@pytest.fixture(scope="module")
def run_anew(make_model, make_recipe, text):
    """`run_anew(family="llama", **recipe)` gives a model and its report."""

    def make(family="llama", dtype=torch.float32, seed=0, layers=2, out=None, **recipe):
        depth = {} if layers == 2 else {"num_hidden_layers": layers}
        model = make_model(family, seed=seed, dtype=dtype, **depth)
        wanted = make_recipe(**{"order": "sequential", **recipe})
        return model, compress(model, wanted, windows=text, out=out)

    return make


@pytest.fixture(scope="module")
def run(run_anew):
    """The same, once for all tests that ask for it alike: not to be changed."""
    made = {}

    def make(family="llama", **settings):
        every = {"family": family, "seed": 0, "layers": 2, "order": "sequential", **settings}
        key = repr(sorted(every.items()))
        if key not in made:
            made[key] = run_anew(**every)
        return made[key]

    return make


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def blocks_of(model):
    return model.get_submodule(block_path(model))


@torch.no_grad()
def block_outputs(model, windows):
    """What each block gives for all tokens."""
    found = [[] for _ in blocks_of(model)]

    def keep(index):
        def hook(_module, _args, output):
            states = output[0] if isinstance(output, tuple) else output
            found[index].append(states.double().flatten(0, 1))

        return hook

    handles = [b.register_forward_hook(keep(i)) for i, b in enumerate(blocks_of(model))]
    model(input_ids=torch.stack(windows.windows), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(states) for states in found]


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_close_state(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        gap = (tensor - right[name]).norm()
        assert float(gap) <= ROUNDING * float(tensor.norm()), name


def assert_block_errors(report, dense, model, text):
    """Hold them against what both whole models give; nothing of the walk over blocks is run."""
    path = block_path(model)
    assert [(b.index, b.name) for b in report.blocks] == [(i, f"{path}.{i}") for i in range(2)]
    for part, found in zip(
        hold_out(text, 8),
        ([b.calibration for b in report.blocks], [b.held_out for b in report.blocks]),
        strict=True,
    ):
        pairs = zip(block_outputs(dense, part), block_outputs(model, part), strict=True)
        for (wanted, given), error in zip(pairs, found, strict=True):
            share = float((wanted - given).square().sum() / wanted.square().sum())
            cosines = torch.cosine_similarity(wanted, given, dim=-1)
            assert error.relative_error == pytest.approx(share, rel=1e-3)
            assert error.cosine_distance == pytest.approx(float((1 - cosines).mean()), rel=1e-3)
    for block in report.blocks:
        assert block.unrefined_calibration is None
        assert block.unrefined_held_out is None
        assert block.refinement is None
        assert block.peak_bytes > 0


def low_rank(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def ranks_of(report):
    return {x.name: x.rank for x in report.linears}


def mean_error(report):
    return sum(b.calibration.relative_error for b in report.blocks) / len(report.blocks)


# The inputs of falcon's first MLP depend on the token only, and there are fewer than 128.
@pytest.mark.filterwarnings("ignore:a second moment of size 128 is singular")
@pytest.mark.parametrize(("family", "method"), EVERY)
def test_promises_blocks_and_folder(family, method, run, make_model, count_params, text, tmp_path):
    model, report = run(family, method=method, layout="auto", out=tmp_path / "out")
    size = report.size
    assert {x.name for x in report.linears} == {
        site.name for site in list_sites(make_model(family), block_path(model))
    }
    steps = sum(m.in_features + m.out_features for m in low_rank(model).values())
    budget = 0.5 * size.target_params_before
    assert budget - steps <= size.target_params <= budget
    assert size.target_params == sum(x.params for x in report.linears)
    assert size.model_params == count_params(model)
    for linear in report.linears:
        least = 2e-6 if linear.jitter else 1e-7
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=least)
        assert linear.stored_loss == pytest.approx(linear.predicted_loss, rel=1e-5, abs=least)
        assert 0 <= linear.predicted_loss < 1
        assert linear.tokens == (0 if method == "svd" else 16 * 32)
        if METHODS[method].needs & STREAMS:
            assert linear.token_check < 1e-4
        else:
            assert linear.token_check is None
    assert report.tokens == 16 * 32
    assert report.allocation is None
    assert_block_errors(report, make_model(family), model, text)
    again = slimrank.load(tmp_path / "out")
    ids = torch.stack(text.windows[:2])
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["svd", "svd-llm", "swift-svd"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_order_changes_nothing_for_methods_of_the_original_stream(
    family, method, run, make_model, make_recipe, text
):
    walked, report = run(family, method=method)
    other = make_model(family)
    expected = compress(
        other, make_recipe(method=method, order="one-shot"), windows=hold_out(text, 8)[0]
    )
    assert ranks_of(report) == ranks_of(expected)
    assert expected.blocks == ()
    if method == "svd":
        assert_same_state(walked.state_dict(), other.state_dict())
    else:
        assert_close_state(walked.state_dict(), other.state_dict())
    for one, two in zip(report.linears, expected.linears, strict=True):
        assert one.predicted_loss == pytest.approx(two.predicted_loss, rel=1e-5)


@pytest.mark.parametrize(("method", "ridge"), [("aa-svd", 0.1), ("shift-aware", 0.0)])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_in_one_shot_nothing_has_shifted(family, method, ridge, run):
    model, report = run(family, method=method, order="one-shot")
    other, expected = run(family, method="swift-svd", ridge=ridge, order="one-shot")
    assert_same_state(model.state_dict(), other.state_dict())
    assert [x.measured_loss for x in report.linears] == [x.measured_loss for x in expected.linears]


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_at_the_first_linears_the_streams_agree(family, run):
    anchored, report = run(family, method="aa-svd")
    plain, _ = run(family, method="swift-svd", ridge=0.1)
    first, last = report.linears[0].name, report.linears[-1].name
    left, right = (m.get_submodule(first).factors().dense() for m in (anchored, plain))
    assert float((left - right).norm()) <= ROUNDING * float(right.norm())
    left, right = (m.get_submodule(last).factors().dense() for m in (anchored, plain))
    assert float((left - right).norm()) > 0.1 * float(right.norm())


def test_an_anchor_of_zero_is_shift_aware(run):
    anchored, _ = run(method="aa-svd", anchor=0.0, ridge=0.0)
    shifted, _ = run(method="shift-aware")
    assert_close_state(anchored.state_dict(), shifted.state_dict())
    halfway, _ = run(method="aa-svd", anchor=0.5, ridge=0.0)
    last = list(low_rank(shifted))[-1]
    left, right = (m.get_submodule(last).factors().dense() for m in (halfway, shifted))
    assert float((left - right).norm()) > 0.01 * float(right.norm())


def test_anchored_blocks_are_nearer_to_the_original_ones(run):
    """AA-SVD's claim, on calibration text: over families and seeds, and on most of them."""
    pairs = [
        [mean_error(run(family, seed=seed, method=x)[1]) for x in ("svd-llm", "aa-svd")]
        for family in ("llama", "opt", "gpt_neox")
        for seed in (0, 1)
    ]
    one_shot, sequential = map(sum, zip(*pairs, strict=True))
    assert sequential < one_shot
    assert sum(after < before for before, after in pairs) > len(pairs) / 2


def test_keeping_all_changes_nothing(run, make_model):
    model, report = run("qwen2", method="aa-svd", keep=1.0, refine="fast")
    assert_same_state(model.state_dict(), make_model("qwen2").state_dict())
    for block in report.blocks:
        assert block.calibration.relative_error < 1e-12
        assert block.refinement is None


@pytest.mark.parametrize("method", ["svd-llm", "aa-svd"])
def test_the_same_recipe_gives_the_same_bits(method, run_anew):
    before = torch.random.get_rng_state()
    (first, one), (second, two) = (run_anew(method=method, refine="fast") for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert_same_state(first.state_dict(), second.state_dict())
    for a, b in zip(one.blocks, two.blocks, strict=True):
        assert (a.calibration, a.held_out) == (b.calibration, b.held_out)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_batch_size_does_not_matter(make_model, make_recipe, text, batch_size):
    models = [make_model("llama") for _ in range(2)]
    recipe = make_recipe(method="aa-svd")
    for model, size in zip(models, (3, batch_size), strict=True):
        compress(model, recipe, windows=text, options=CompressionOptions(batch_size=size))
    assert_close_state(*(model.state_dict() for model in models))


def test_windows_of_unequal_lengths(make_model, make_recipe, make_windows):
    lengths = (40, 7, 40, 23, 2, 60, 40, 23, 9, 31)
    windows = TokenWindows(
        tuple(make_windows(1, n, seed=seed).windows[0] for seed, n in enumerate(lengths))
    )
    report = compress(make_model("mistral"), make_recipe(method="aa-svd"), windows=windows)
    assert report.tokens == sum(lengths[:5])
    assert {x.tokens for x in report.linears} == {report.tokens}
    assert all(x.token_check < 1e-4 for x in report.linears)


def test_no_held_out_text(make_model, make_recipe, text):
    recipe = make_recipe(method="aa-svd", calibration={"held_out_sequences": 0})
    report = compress(make_model("llama"), recipe, windows=text)
    assert report.tokens == text.tokens
    assert [b.held_out for b in report.blocks] == [None, None]


def test_targets_in_one_block_only(run, make_model):
    model, report = run(method="aa-svd", targets=["re:.*layers\\.1\\.mlp"])
    assert {n.split(".")[2] for n in low_rank(model)} == {"1"}
    first, second = report.blocks
    assert first.calibration.relative_error < 1e-12
    assert second.calibration.relative_error > 1e-3


def test_progress_and_hooks(make_model, make_recipe, text):
    seen = []

    def track(steps, what):
        for step in steps:
            seen.append((what, step))
            yield step

    model = make_model("llama")
    options = CompressionOptions(track=track)
    compress(model, make_recipe(method="aa-svd"), windows=text, options=options)
    assert seen == [("compressing", 0), ("compressing", 1)]
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__


@pytest.mark.parametrize("method", ["swift-svd", "shift-aware"])
def test_listed_experts(method, make_experts_model, make_recipe, text):
    model = make_experts_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        report = compress(model, make_recipe(method=method, order="sequential"), windows=text)
    routed = [x for x in report.linears if ".experts." in x.name]
    assert routed
    assert all(x.token_check is None or x.token_check < 1e-4 for x in routed)
    assert all(0 < x.tokens < report.tokens for x in routed)


def test_listed_experts_cannot_be_paired(make_experts_model, make_recipe, text):
    model = make_experts_model()
    with pytest.raises(ModelError, match=r"experts\.\d\.\w+ receives .* use method shift-aware"):
        compress(model, make_recipe(method="aa-svd"), windows=text)
    assert not low_rank(model)
    recipe = make_recipe(method="aa-svd", ignore=["*experts*"])
    assert all(".experts." not in x.name for x in compress(model, recipe, windows=text).linears)


@pytest.mark.filterwarnings("ignore:.*saw . tokens:slimrank.errors.NumericalWarning")
@pytest.mark.parametrize("ridge", [None, 0.0])
@pytest.mark.parametrize("method", ["shift-aware", "aa-svd"])
def test_few_tokens_that_are_met_almost_exactly(
    method, ridge, make_model, make_recipe, make_windows
):
    """The anchored loss is then a small difference of energies, known to rounding of those."""
    model = make_model("llama")
    recipe = make_recipe(keep=0.7, method=method, ridge=ridge)
    report = compress(model, recipe, windows=make_windows(1, 5))
    assert all(x.token_check < 5e-3 for x in report.linears)
    assert all(b.calibration.relative_error < 1e-2 for b in report.blocks)


def test_moments_of_other_tokens_are_seen(make_model, make_recipe, text, monkeypatch):
    """A check that never fails would be none."""
    real = slimrank.calibration.sums.DriftAccumulator.update

    def update(self, original, shifted, centred):
        real(self, original.flip(-2), shifted, centred)

    monkeypatch.setattr("slimrank.calibration.sums.DriftAccumulator.update", update)
    with pytest.raises(NumericalError, match=r"but their moments say .*; please report this model"):
        compress(make_model("llama"), make_recipe(method="aa-svd"), windows=text)


@pytest.mark.parametrize("method", ["svd-llm", "shift-aware", "aa-svd"])
def test_a_weight_that_is_not_finite_is_named(method, make_model, make_recipe, text):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        compress(model, make_recipe(method=method, order="sequential"), windows=text)
    assert not low_rank(model)


# Allocation: what ranks are chosen from looks at the original stream, whatever the method.


@pytest.fixture(scope="module")
def swift_ranks(make_model, make_recipe, make_profile, text):
    """Ranks of allocation swift from a profile by swift-svd, and the profile."""
    model = make_model("llama", num_hidden_layers=3)
    found = make_profile(model, windows=text)
    recipe = make_recipe(allocation="swift", swift=FIXED_WEIGHT)
    return ranks_of(compress(model, recipe, profile=found.folder)), found


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
@pytest.mark.parametrize("method", METHODS)
def test_any_allocation_works_with_any_method(method, order, run, swift_ranks):
    expected, _ = swift_ranks
    settings = {"allocation": "swift", "swift": FIXED_WEIGHT}
    _, report = run(layers=3, method=method, order=order, **settings)
    _, uniform = run(layers=3, method=method, order=order)
    assert ranks_of(report) == expected != ranks_of(uniform)
    assert report.allocation.importance_weight == 0.5
    assert report.size.target_params == uniform.size.target_params
    assert len(report.blocks) == (3 if order == "sequential" else 0)
    assert report.tokens == (0 if (method, order) == ("svd", "one-shot") else 16 * 32)
    for linear in report.linears:
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=1e-7)


def test_the_weight_is_searched_for_with_a_sequential_method(run):
    _, report = run(layers=3, method="aa-svd", allocation="swift")
    assert len(report.allocation.trials) == 11
    assert report.allocation.held_out_tokens == 8 * 32


@pytest.mark.parametrize("method", ["svd", "aa-svd"])
def test_ranks_from_a_given_profile(method, make_model, make_recipe, text, swift_ranks, run):
    expected, found = swift_ranks
    model = make_model("llama", num_hidden_layers=3)
    recipe = make_recipe(method=method, order="sequential", allocation="swift", swift=FIXED_WEIGHT)
    report = compress(model, recipe, windows=text, profile=found.folder)
    assert ranks_of(report) == expected
    own, _ = run(layers=3, method=method, allocation="swift", swift=FIXED_WEIGHT)
    assert_same_state(model.state_dict(), own.state_dict())


def test_a_profile_by_another_method_is_refused(make_model, make_recipe, make_profile, text):
    model = make_model("llama")
    folder = make_profile(model, make_recipe(method="svd-llm"), windows=text).folder
    settings = {"allocation": "swift", "swift": FIXED_WEIGHT}
    for method in ("aa-svd", "svd", "shift-aware"):
        recipe = make_recipe(method=method, order="sequential", **settings)
        with pytest.raises(CheckpointError, match="by svd-llm; the recipe asks for swift-svd"):
            compress(model, recipe, windows=text, profile=folder)
        assert not low_rank(model)
    own = make_recipe(method="svd-llm", order="sequential", **settings)
    assert compress(model, own, windows=text, profile=folder).blocks


@pytest.mark.parametrize(
    "settings",
    [{"method": "aa-svd"}, {"method": "svd"}, {"method": "swift-svd", "order": "sequential"}],
    ids=str,
)
def test_a_profile_of_which_nothing_is_used_is_refused(
    settings, make_model, make_recipe, text, swift_ranks
):
    model = make_model("llama", num_hidden_layers=3)
    with pytest.raises(RecipeError, match="nothing of the profile would be used"):
        compress(model, make_recipe(**settings), windows=text, profile=swift_ranks[1].folder)
    assert not low_rank(model)


# Greedy ranks: each block keeps what it had, and shares it out anew.


def block_params(report):
    sums = {}
    for linear in report.linears:
        block = int(linear.name.split(".")[2])
        sums[block] = sums.get(block, 0) + linear.params
    return sums


@pytest.mark.parametrize("allocation", ["uniform", "swift"])
@pytest.mark.parametrize("method", ["svd", "svd-llm", "shift-aware", "aa-svd"])
def test_greedy_ranks_within_blocks(method, allocation, run):
    settings = {"swift": FIXED_WEIGHT} if allocation == "swift" else {}
    _, fixed = run(layers=3, method=method, allocation=allocation, **settings)
    model, report = run(
        layers=3, method=method, allocation=allocation, within_block="greedy", **settings
    )
    before, after = block_params(fixed), block_params(report)
    assert after.keys() == before.keys()
    for block, params in after.items():
        assert before[block] - 80 < params <= before[block]  # one rank of the largest takes 80
    assert ranks_of(report) != ranks_of(fixed)
    assert report.size.target_params <= fixed.size.target_params
    assert ranks_of(report) == {n: m.rank for n, m in low_rank(model).items()}
    for linear in report.linears:
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=1e-7)


def test_greedy_keeps_multiples_and_least_ranks(run):
    budget = {"param_ratio": 0.6, "multiple_of": 2, "min_rank": 3}
    _, report = run(method="aa-svd", budget=budget, within_block="greedy")
    assert all(x.rank % 2 == 0 and x.rank >= 4 for x in report.linears)


def test_greedy_leaves_the_ranks_of_the_cache(run):
    settings = {"method": "aa-svd", "keep": 0.7, "kv_cache": {"keep": 0.5}}
    _, report = run(within_block="greedy", **settings)
    _, fixed = run(**settings)
    cached = {n: r for n, r in ranks_of(fixed).items() if n.endswith(("k_proj", "v_proj"))}
    assert set(cached.values()) == {8}
    assert ranks_of(report).items() >= cached.items()
    assert ranks_of(report) != ranks_of(fixed)
    assert report.kv_cache == fixed.kv_cache


# Refinement: blocks are trained towards the original ones.


@pytest.mark.parametrize("preset", ["fast", "paper"])
@pytest.mark.parametrize(
    ("family", "method"), [("llama", "svd"), ("qwen2", "aa-svd"), ("opt", "svd-llm")]
)
def test_refinement_lowers_the_error(family, method, preset, run):
    _, plain = run(family, method=method)
    _, report = run(family, method=method, refine=preset)
    assert ranks_of(report) == ranks_of(plain)
    first, same = report.blocks[0], plain.blocks[0]
    assert first.unrefined_calibration.relative_error == pytest.approx(
        same.calibration.relative_error, rel=1e-3
    )
    for block in report.blocks:
        now, before = block.calibration, block.unrefined_calibration
        assert block.refinement.trained_params > 0
        if preset == "paper":
            assert now.relative_error < before.relative_error
            assert len(block.refinement.epochs) == block.refinement.kept_epoch == 25
        else:
            held_out = block.held_out.relative_error
            assert held_out <= 1.00001 * block.unrefined_held_out.relative_error
            assert (now.relative_error < before.relative_error) == (block.refinement.kept_epoch > 0)
    assert any(block.refinement.kept_epoch > 0 for block in report.blocks)


@pytest.mark.parametrize("family", ["qwen2", "opt", "phi3"])
def test_norms_and_biases_are_trained_and_written(family, run, make_model, tmp_path):
    out = tmp_path / "out"
    model, _ = run(family, method="svd-llm", refine="fast", out=out)
    dense, written = make_model(family).state_dict(), load_file(out / "model.safetensors")
    path = block_path(model)
    for name, tensor in model.state_dict().items():
        assert name not in written or torch.equal(written[name], tensor), name
    inside = {n for n in dense if n.startswith(f"{path}.") and dense[n].ndim == 1}
    assert inside <= written.keys()
    changed = {n for n in inside if not torch.equal(dense[n], written[n])}
    kinds = {"norm", "bias"} if family != "phi3" else {"norm"}
    assert all(any(kind in name for name in changed) for kind in kinds)
    outside = {n for n in written if not n.startswith(f"{path}.")}
    assert outside
    assert all(torch.equal(written[n], dense[n]) for n in outside)


def test_only_what_is_named_is_trained(run, make_model):
    model, _ = run("qwen2", refine={"preset": "fast", "trains": ["factors"]})
    dense = make_model("qwen2").state_dict()
    state = model.state_dict()
    kept = {n for n in dense if dense[n].ndim == 1}
    assert all(torch.equal(state[n], dense[n]) for n in kept)
    plain, _ = run("qwen2")
    name = next(iter(low_rank(plain)))
    left, right = (m.get_submodule(name).factors().dense() for m in (model, plain))
    assert not torch.equal(left, right)


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma2", "opt"])
def test_ties_hold_after_refinement(family, run, make_model, tmp_path):
    out = tmp_path / "out"
    model, _ = run(family, method="svd-llm", refine="fast", out=out)
    expected = make_model(family).get_input_embeddings().weight
    for found in (model, slimrank.load(out)):
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
        assert torch.equal(found.get_input_embeddings().weight, expected)


def test_half_precision_stays(run, tmp_path):
    dtype = torch.bfloat16
    model, report = run("qwen2", dtype=dtype, method="aa-svd", refine="fast", out=tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    for block in report.blocks:
        assert block.calibration.relative_error < 1.02 * block.unrefined_calibration.relative_error
    for linear in report.linears:
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=1e-7)
        assert linear.token_check < 1e-2


@pytest.mark.parametrize("frozen", [False, True])
def test_no_graph_is_left(frozen, make_model, make_recipe, text):
    model = make_model("llama").requires_grad_(not frozen)
    compress(model, make_recipe(method="aa-svd", refine="fast"), windows=text)
    for parameter in model.parameters():
        assert parameter.is_leaf
        assert parameter.grad is None
        assert parameter.requires_grad != frozen


# A run that is cut off, or has little memory.


@pytest.mark.parametrize("memory", [0, 1000])
def test_a_limit_of_memory_changes_no_bit(memory, make_model, make_recipe, text, tmp_path):
    recipe = make_recipe(method="aa-svd", refine="fast", within_block="greedy")
    free, limited = make_model("llama"), make_model("llama")
    compress(free, recipe, windows=text)
    options = CompressionOptions(memory=memory)
    compress(limited, recipe, windows=text, options=options, out=tmp_path / "out")
    assert_same_state(free.state_dict(), limited.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, NumericalError])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "qwen2_tied"])
def test_a_model_that_is_cut_off_is_as_it_was(family, error, make_model, make_recipe, text):
    """Linears, and the norms and biases that a refinement has changed."""
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    modules = {n: id(m) for n, m in model.named_modules()}
    changed = []

    def track(steps, _what):
        for step in steps:
            if step == 1:
                changed.extend(low_rank(model))
                raise error
            yield step

    recipe = make_recipe(keep=0.7, method="aa-svd", refine="fast", kv_cache={"keep": 0.5})
    options = CompressionOptions(track=track)
    with pytest.raises(error):
        compress(model, recipe, windows=text, options=options)
    assert changed
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert_same_state(model.state_dict(), before)
    assert not any(p.grad is not None for p in model.parameters())
