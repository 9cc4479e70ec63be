"""The one data flow, on every family: budgets held, promises kept, nothing changed on the side."""

import copy
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import slimrank
from slimrank import CompressionOptions, LowRankLinear, TokenWindows, compress
from slimrank.checkpoint import read_report
from slimrank.errors import (
    BudgetError,
    CoverageWarning,
    ModelError,
    NotPositiveDefiniteError,
    NumericalError,
    NumericalWarning,
    RecipeError,
    TextError,
)
from slimrank.linalg import decompose_outputs
from slimrank.model import block_path, list_sites, replace_linear

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def low_rank(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("keep", "layout"), [(0.3, "auto"), (0.85, "plain")])
def test_budget_and_promises(family, make_model, make_compressed, count_params, keep, layout):
    model, report = make_compressed(family, keep=keep, layout=layout)
    size = report.size
    sites = list_sites(make_model(family), block_path(model))
    assert {x.name for x in report.linears} == {site.name for site in sites}
    assert size.target_params_before == sum(site.shape.dense_params for site in sites)
    budget = keep * size.target_params_before
    steps = sum(site.shape.params(1) for site in sites)
    assert budget - steps <= size.target_params <= budget
    assert size.target_params == sum(x.params for x in report.linears)
    assert size.model_params == count_params(model)
    assert size.model_params_before == sum(p.numel() for p in make_model(family).parameters())
    found = low_rank(model)
    assert {x.name: x.rank for x in report.linears} == {n: m.rank for n, m in found.items()}
    for linear in report.linears:
        module = found[linear.name]
        stored = module.latent.weight.numel() + module.expand.weight.numel()
        assert linear.params == stored + 2 * linear.pivoted * module.rank
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=1e-12)
        assert linear.stored_loss == pytest.approx(linear.predicted_loss, rel=1e-5, abs=1e-9)
        assert 0 <= linear.predicted_loss < 1
        assert linear.token_check < 1e-4
        assert linear.tokens == report.tokens == 8 * 24
        assert linear.jitter == 0.0
    assert report.recipe_fingerprint == report.recipe.fingerprint()


def test_losses_fall_as_more_is_kept(make_compressed):
    losses = [
        [x.measured_loss for x in make_compressed("llama", keep=keep)[1].linears]
        for keep in (0.3, 0.5, 0.7, 0.9)
    ]
    for less, more in pairwise(losses):
        assert all(a > b for a, b in zip(less, more, strict=True))


def test_keeping_all_changes_nothing(family, make_model, make_compressed):
    model, report = make_compressed(family, keep=1.0)
    assert_same_state(model.state_dict(), make_model(family).state_dict())
    assert all(x.rank is None for x in report.linears)
    assert report.size.target_params == report.size.target_params_before
    assert getattr(model.config, "quantization_config", None) is None


def test_full_rank_gives_the_logits_back(family, make_model, probe):
    model = make_model(family)
    expected = logits_of(model, probe)
    for site in list_sites(model, block_path(model)):
        linear = model.get_submodule(site.name)
        moment = torch.eye(linear.in_features, dtype=torch.float64)
        factors = decompose_outputs(linear.weight, moment).truncate(min(linear.weight.shape))
        replace_linear(model, site.name, LowRankLinear.from_factors(linear, factors))
    torch.testing.assert_close(logits_of(model, probe), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "falcon", "opt"])
def test_svd_needs_no_calibration(family, make_model, make_recipe):
    model = make_model(family)
    report = compress(model, make_recipe(method="svd"))
    assert report.tokens == 0
    assert report.calibration_fingerprint == ""
    for linear in report.linears:
        assert linear.tokens == 0
        assert linear.token_check is None
        weight = make_model(family).get_submodule(linear.name).weight.detach().double()
        values = torch.linalg.svdvals(weight).square()
        expected = float(values[linear.rank :].sum() / values.sum())
        assert linear.predicted_loss == pytest.approx(expected, rel=1e-6)


def test_svd_uses_no_windows_that_it_is_given(make_compressed):
    _, report = make_compressed("llama", method="svd")
    assert report.tokens == 0
    assert report.calibration_fingerprint == ""


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3", "opt"])
def test_svd_llm_and_swift_svd_agree(family, make_compressed, probe):
    swift, first = make_compressed(family, method="swift-svd")
    cholesky, second = make_compressed(family, method="svd-llm")
    for a, b in zip(first.linears, second.linears, strict=True):
        assert (a.name, a.rank) == (b.name, b.rank)
        assert a.predicted_loss == pytest.approx(b.predicted_loss, rel=1e-6)
    torch.testing.assert_close(
        logits_of(swift, probe), logits_of(cholesky, probe), rtol=1e-3, atol=1e-3
    )


def test_activations_count(make_compressed):
    """Plain SVD and the method that looks at inputs give other factors."""
    model, _ = make_compressed("llama", method="svd")
    aware, _ = make_compressed("llama")
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.expand.weight,
        aware.model.layers[0].mlp.up_proj.expand.weight,
    )


@pytest.mark.parametrize("family", ["qwen2", "opt", "phi3"])
def test_biases_are_kept_to_the_bit(family, make_model, make_compressed):
    model, _ = make_compressed(family)
    dense = make_model(family)
    for name, module in low_rank(model).items():
        bias = dense.get_submodule(name).bias
        assert (module.bias is None) == (bias is None)
        assert bias is None or torch.equal(module.bias, bias)


def test_all_else_is_kept_to_the_bit(family, make_model, make_compressed):
    model, _ = make_compressed(family)
    dense, found = make_model(family).state_dict(), model.state_dict()
    swapped = low_rank(model)
    for name, tensor in dense.items():
        if name.removesuffix(".weight") not in swapped:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma2", "gemma3", "opt", "falcon"])
def test_ties_hold(family, make_compressed):
    model, report = make_compressed(family)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    parts = model.get_input_embeddings().weight.numel()
    assert report.size.model_params < parts + report.size.target_params_before


@pytest.mark.parametrize("keep", [0.8])
def test_scope_model(family, make_compressed, count_params, keep, tiny):
    if family in tiny.FUSED:
        pytest.skip("most of these stays dense")
    model, report = make_compressed(family, keep=keep, scope="model")
    total = count_params(model)
    steps = sum(m.in_features + m.out_features for m in low_rank(model).values())
    budget = keep * report.size.model_params_before
    assert total == report.size.model_params
    assert budget - steps <= total <= budget


def test_scope_model_below_what_stays(make_compressed):
    with pytest.raises(BudgetError, match="embeddings, head, norms"):
        make_compressed("llama", keep=0.1, scope="model")


def test_a_budget_below_rank_one(make_compressed):
    with pytest.raises(BudgetError, match="smallest share that works"):
        make_compressed("llama", keep=0.01)


@pytest.mark.parametrize(("multiple", "least"), [(4, 1), (1, 7), (8, 3)])
def test_multiples_and_least_ranks(make_model, make_recipe, windows, multiple, least):
    budget = {"param_ratio": 0.8, "multiple_of": multiple, "min_rank": least}
    report = compress(make_model("qwen3"), make_recipe(budget=budget), windows=windows)
    assert all(x.rank % multiple == 0 and x.rank >= least for x in report.linears)


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["up_proj", "down_proj"], [], {"up_proj", "down_proj"}),
        (None, ["re:.*self_attn"], {"gate_proj", "up_proj", "down_proj"}),
        (["*.mlp.*"], ["gate_proj"], {"up_proj", "down_proj"}),
        (["re:.*layers\\.1\\.mlp"], [], {"gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets_and_ignore(make_compressed, make_model, targets, ignore, expected, probe):
    recipe = {"ignore": ignore} | ({"targets": targets} if targets else {})
    model, report = make_compressed("llama", **recipe)
    assert {name.rsplit(".", 1)[1] for name in low_rank(model)} == expected
    assert {x.name for x in report.linears} == set(low_rank(model))
    assert report.size.target_params_before == sum(x.params_before for x in report.linears)
    assert report.size.target_params <= 0.5 * report.size.target_params_before
    if targets == ["re:.*layers\\.1\\.mlp"]:
        assert not [name for name in low_rank(model) if "layers.0" in name]


def test_a_target_that_matches_nothing(make_compressed):
    with pytest.raises(RecipeError, match="q_prjo"):
        make_compressed("llama", targets=["q_prjo"])


def test_an_expert_that_saw_no_token_is_told(make_experts_model, make_recipe, windows):
    model = make_experts_model(closed=(2,))
    with pytest.warns(NumericalWarning) as caught:
        report = compress(model, make_recipe(), windows=windows)
    for block in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{block}.mlp.experts.2.{part}"
            told = [w for w in report.warnings if w.startswith(f"{name} saw 0 tokens")]
            assert len(told) == 1
            assert told[0] in {str(w.message) for w in caught}
            linear = next(x for x in report.linears if x.name == name)
            assert linear.tokens == 0
            assert linear.token_check is None
            module = model.get_submodule(name)
            assert torch.isfinite(module.factors().left).all()
            assert module.factors().right.norm() > 0.1  # of the weight, since tokens are silent
    seen = [x for x in report.linears if ".experts." in x.name and ".experts.2." not in x.name]
    assert all(x.tokens > 0 for x in seen)


def test_routers_stay_dense(make_experts_model, make_recipe, windows):
    model = make_experts_model(experts=4, top=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        compress(model, make_recipe(keep=0.4), windows=windows)
    assert isinstance(model.model.layers[0].mlp.gate, nn.Linear)
    assert isinstance(model.model.layers[0].mlp.experts[0]["up_proj"], LowRankLinear)


def test_svd_llm_refuses_an_expert_without_tokens_by_name(make_experts_model, make_recipe, windows):
    model = make_experts_model(closed=(2,))
    with pytest.raises(NotPositiveDefiniteError, match=r"layers\.0\.mlp\.experts\.2\.\w+: .*swift"):
        compress(model, make_recipe(method="svd-llm"), windows=windows)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_told(family, make_model, make_recipe, windows):
    with pytest.warns(CoverageWarning, match="fused tensors stay dense") as caught:
        report = compress(make_model(family), make_recipe(), windows=windows)
    assert len([w for w in report.warnings if "fused tensors" in w]) == 1
    assert len([w for w in caught if issubclass(w.category, CoverageWarning)]) == 1


def test_fewer_tokens_than_rank_are_told(make_model, make_recipe, make_windows):
    with pytest.warns(NumericalWarning):
        report = compress(make_model("llama"), make_recipe(), windows=make_windows(1, 5))
    assert any("saw 5 tokens, fewer than its rank" in warning for warning in report.warnings)
    assert all(x.measured_loss < 1e-6 for x in report.linears if x.rank > 5)


@pytest.mark.parametrize("method", ["swift-svd", "svd-llm", "svd"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_same_recipe_gives_the_same_bits(family, method, make_compressed):
    (first, one), (second, two) = (make_compressed(family, method=method) for _ in range(2))
    assert_same_state(first.state_dict(), second.state_dict())
    drop = {"seconds", "peak_bytes"}
    left, right = one.model_dump(exclude=drop), two.model_dump(exclude=drop)
    for each in (left, right):
        for linear in each["linears"]:
            del linear["seconds"]
    assert left == right


def test_the_state_of_the_global_generator_is_left_alone(make_compressed):
    before = torch.random.get_rng_state()
    make_compressed("llama")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(make_model, make_recipe, windows, probe, batch_size):
    model, other = make_model("llama"), make_model("llama")
    compress(model, make_recipe(), windows=windows)
    options = CompressionOptions(batch_size=batch_size)
    report = compress(other, make_recipe(), windows=windows, options=options)
    torch.testing.assert_close(
        logits_of(model, probe), logits_of(other, probe), rtol=1e-4, atol=1e-4
    )
    assert all(x.token_check < 1e-4 for x in report.linears)


def test_windows_of_unequal_lengths(make_model, make_recipe, make_windows):
    windows = TokenWindows(
        tuple(make_windows(1, n, seed=n).windows[0] for n in (40, 7, 40, 23, 1, 60))
    )
    report = compress(make_model("mistral"), make_recipe(), windows=windows)
    assert report.tokens == 171
    assert {x.tokens for x in report.linears} == {171}


def test_text_and_tokenizer(make_model, make_recipe, tiny_tokenizer):
    model = make_model("llama")
    report = compress(model, make_recipe(), tokenizer=tiny_tokenizer)
    assert report.tokens == 8 * 32
    again = compress(make_model("llama"), make_recipe(), tokenizer=tiny_tokenizer)
    assert report.calibration_fingerprint == again.calibration_fingerprint != ""


def test_a_model_in_memory_needs_something_to_calibrate_on(make_model, make_recipe):
    model = make_model("llama")
    with pytest.raises(RecipeError, match=r"needs tokenizer=\.\.\. or windows"):
        compress(model, make_recipe())
    assert not low_rank(model)


def test_a_model_by_its_path_needs_a_folder(dense_folder, make_recipe):
    with pytest.raises(RecipeError, match="out="):
        compress(dense_folder, make_recipe())


def test_a_compressed_model_is_refused(make_compressed, make_recipe, windows):
    model, _ = make_compressed("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="LlamaForCausalLM is compressed already"):
        compress(model, make_recipe(), windows=windows)
    assert_same_state(before, model.state_dict())


def test_tokens_outside_the_vocabulary(make_model, make_recipe):
    with pytest.raises(TextError, match="token id 96 is outside"):
        compress(make_model("llama"), make_recipe(), windows=TokenWindows((torch.tensor([5, 96]),)))


@pytest.mark.parametrize("method", ["swift-svd", "svd-llm", "svd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(make_model, make_recipe, windows, method, bad):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.(up|down)_proj"):
        compress(model, make_recipe(method=method), windows=windows)


def test_gpt2_is_refused(make_model, make_recipe, windows):
    with pytest.raises(ModelError, match="Conv1D"):
        compress(make_model("gpt2"), make_recipe(), windows=windows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "falcon", "gemma2"])
def test_generate_after_compression(family, make_compressed, tiny):
    model, _ = make_compressed(family, keep=0.8)
    ids = torch.tensor([[tiny.BOS, 10, 11, 12]])
    made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 28)
    whole = logits_of(model, made[:, :-1])[0, 3:].argmax(-1)  # the cache changes nothing
    assert float((whole == made[0, 4:]).float().mean()) > 0.9


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "opt"])
def test_from_folder_to_folder(family, make_folder, make_recipe, tmp_path, probe):
    out = tmp_path / "out"
    folder = make_folder(family)
    report = compress(folder, make_recipe(), out=out)
    assert read_report(out) == report
    assert report.model == str(folder)
    assert slimrank.CompressionReport.from_json(report.model_dump_json(), "r") == report
    loaded = slimrank.load(out)
    assert {n: m.rank for n, m in low_rank(loaded).items()} == {
        x.name: x.rank for x in report.linears
    }
    assert torch.isfinite(logits_of(loaded, probe)).all()


def test_a_folder_and_a_model_in_memory_give_the_same(
    dense_folder, make_model, make_recipe, compressed_folder, tiny_tokenizer
):
    model = make_model("llama")
    compress(model, make_recipe(layout="auto"), tokenizer=tiny_tokenizer)
    assert_same_state(model.state_dict(), slimrank.load(compressed_folder).state_dict())


def test_half_precision(family, make_compressed, tiny):
    dtype = torch.float16 if family in tiny.TIED else torch.bfloat16
    _, report = make_compressed(family, dtype=dtype)
    for linear in report.linears:
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6, abs=1e-12)
        assert linear.stored_loss == pytest.approx(linear.predicted_loss, rel=0.05, abs=1e-4)
        assert linear.token_check < 5e-3


def test_the_recipes_dtype(dense_folder, make_recipe, tmp_path):
    report = compress(dense_folder, make_recipe(dtype="bfloat16"), out=tmp_path / "out")
    assert report.environment["dtype"] == "bfloat16"
    model = slimrank.load(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_progress(make_model, make_recipe, windows):
    seen = []

    def track(steps, what):
        for step in steps:
            seen.append((step, what))
            yield step

    compress(
        make_model("llama"), make_recipe(), windows=windows, options=CompressionOptions(track=track)
    )
    assert [step for step, _ in seen] == [0, 1]


def test_frozen_parameters_stay_frozen(make_model, make_recipe, windows):
    model = make_model("llama").requires_grad_(False)
    compress(model, make_recipe(), windows=windows)
    assert not any(p.requires_grad for p in model.parameters())


def test_no_graph_is_built(make_compressed):
    model, _ = make_compressed("llama")
    assert all(p.is_leaf and p.grad is None for p in model.parameters())


def test_no_warning_of_torch_reaches_the_user():
    """In a fresh process, since torch gives most of its warnings once."""
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, slimrank\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1,"
        " intermediate_size=48, num_attention_heads=4, num_key_value_heads=2))\n"
        "windows = slimrank.TokenWindows(tuple(torch.arange(256).remainder(64).split(32)))\n"
        "recipe = slimrank.CompressionRecipe(budget={'param_ratio': 0.5}, method='svd')\n"
        "slimrank.compress(model, recipe)\n"
    )
    source = Path(slimrank.__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_weights_are_hashed_only_where_the_hash_is_read(
    make_model, make_recipe, windows, tmp_path, monkeypatch
):
    """Of large models that takes long. A run that can be resumed must know its model."""
    hashed = []

    def fingerprint(model):
        hashed.append(model)
        return "of these weights"

    monkeypatch.setattr("slimrank.compression.weights_fingerprint", fingerprint)
    recipe = make_recipe(method="aa-svd")
    compress(make_model("llama"), recipe, windows=windows)
    assert hashed == []
    compress(make_model("llama"), recipe, windows=windows, out=tmp_path / "out")
    assert len(hashed) == 1
