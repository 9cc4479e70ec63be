"""What is computed on an accelerator is what is computed on the CPU; a stand-in plays the part."""

import shutil
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interrupted import CutOff, stopping
from slimrank import CompressionRecipe, CompressionReport, HealRecipe, compress, heal, load, profile
from slimrank.calibration import TokenWindows
from slimrank.checkpoint import load_mapped
from slimrank.errors import ModelError
from slimrank.evaluation import perplexity
from slimrank.healing import training
from slimrank.linalg import Factors, float64_device, in_float64
from slimrank.model import device_of, is_mapped, let_go, staying
from slimrank.nn import Int8Linear, LowRankLinear, remap_factors, round_factors
from slimrank.options import CompressionOptions
from slimrank.source import load_model, open_model, parse_source, require_device
from tiny import models
from tiny.far import Far, on_far

EXPERTS = ("mixtral", "qwen3_moe")  # no model of theirs is streamed
FAR = CompressionOptions(device="far")
STREAM = CompressionOptions(device="far", stream=True)
REFINE = {"preset": "fast", "epochs": 1}
IN_SEQUENCE = {"calibration": {"held_out_sequences": 2}}
RECIPES: dict[str, dict[str, Any]] = {
    "no text": {"method": "svd", "allocation": "uniform"},
    "plain": {"method": "swift-svd", "allocation": "uniform", "layout": "plain"},
    "whitened": {"method": "svd-llm", "allocation": "uniform"},
    "default": {"effort": "balanced"},
    "drawn labels": {"method": "kfac-svd", "gradients": {"labels": "model"}},
    "rows": {"method": "fwsvd", "allocation": "uniform"},
    "threshold": {"method": "asvd", "allocation": "threshold"},
    "dynamic": {"method": "swift-svd", "allocation": "swift"},
    "two passes": {"passes": 2},
    "latents": {"kv_cache": {"keep": 0.5}},
    "refined": {"method": "aa-svd", "refine": REFINE, **IN_SEQUENCE},
    "by predictions": {"method": "aa-svd", "refine": {**REFINE, "loss": "kl"}, **IN_SEQUENCE},
    "by gradients": {"method": "aa-svd", "refine": {**REFINE, "loss": "gradient"}, **IN_SEQUENCE},
    "in another order": {"method": "swift-svd", "allocation": "uniform", "within_block": "greedy"},
}
ADAPTERS = {"lora_rank": 2, "learning_rate": 3e-2, "epochs": 4}
TUNED = {"tune": {"epochs": 1}, **IN_SEQUENCE}


def _recipe(values: dict[str, Any]) -> CompressionRecipe:
    return CompressionRecipe.from_dict({"effort": "fast", "budget": {"param_ratio": 0.6}, **values})


def _windows(count: int = 10) -> TokenWindows:
    ids = torch.randint(4, 96, (count, 24), generator=torch.Generator().manual_seed(0))
    return TokenWindows(tuple(ids))


def _dense(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    path = folder / "dense"
    models.build(family, **overrides).save_pretrained(path)
    models.build_tokenizer().save_pretrained(path)
    return path


def _tensors(model: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: t.inner if isinstance(t, Far) else t for name, t in state.items()}


def _ranks(report: CompressionReport) -> list[int | None]:
    return [linear.rank for linear in report.linears]


def _compare_with_cpu(_: Path) -> None:
    for name, values in {**RECIPES, "tuned": TUNED}.items():
        found = []
        for device in ("cpu", "far"):
            model = models.build("llama")
            options = CompressionOptions(device=device)
            report = compress(model, _recipe(values), windows=_windows(), options=options)
            assert {t.device.type for t in model.state_dict().values()} == {device}, name
            found.append((_ranks(report), _tensors(model)))
        (ranks, expected), (others, seen) = found
        assert ranks == others, name
        for key, tensor in expected.items():
            torch.testing.assert_close(
                seen[key], tensor, rtol=2e-3, atol=2e-3, msg=lambda m, at=(name, key): f"{at}: {m}"
            )


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_device_gives_what_the_cpu_gives(has_float64, tmp_path):
    on_far(_compare_with_cpu, tmp_path, has_float64=has_float64)


def _compare_streamed(folder: Path) -> None:
    dense = _dense(folder)
    for name, values in RECIPES.items():
        outs = folder / "whole", folder / "streamed"
        reports = [
            compress(dense, _recipe(values), out=out, windows=_windows(), options=options)
            for out, options in zip(outs, (FAR, STREAM), strict=True)
        ]
        assert _ranks(reports[0]) == _ranks(reports[1]), name
        whole, streamed = (load(out, dtype="auto").state_dict() for out in outs)
        assert whole.keys() == streamed.keys()
        assert all(torch.equal(whole[key], streamed[key]) for key in whole), name
        for out in outs:
            shutil.rmtree(out)


@pytest.mark.parametrize("has_float64", [True, False])
def test_a_streamed_model_gives_the_same_there(has_float64, tmp_path):
    on_far(_compare_streamed, tmp_path, has_float64=has_float64)


def _profile_and_evaluate(folder: Path) -> None:
    dense, recipe = _dense(folder), _recipe(RECIPES["default"])
    ids = torch.cat(_windows().windows)
    found = []
    for options in (CompressionOptions(), FAR, STREAM):
        path = folder / f"profile {options.device} {options.stream}"
        made = profile(dense, recipe, path, windows=_windows(), options=options)
        report = compress(dense, recipe, out=folder / "out", profile=path, options=options)
        shutil.rmtree(folder / "out")
        model = open_model(parse_source(dense), device=options.device, stream=options.stream)
        found.append((len(made.manifest.linears), _ranks(report), perplexity(model, ids, 24)))
    (count, ranks, expected), *others = found
    for other_count, other_ranks, seen in others:
        assert (other_count, other_ranks) == (count, ranks)
        assert seen.value == pytest.approx(expected.value, rel=1e-5)


def test_profiles_and_perplexities_are_the_same(tmp_path):
    on_far(_profile_and_evaluate, tmp_path)


def _go_on(folder: Path) -> None:
    dense = _dense(folder)
    windows = _windows()
    for values in (RECIPES["default"], RECIPES["refined"]):
        recipe, out = _recipe(values), folder / "out"
        compress(dense, recipe, out=out, windows=windows, options=STREAM)
        expected = load(out, dtype="auto").state_dict()
        shutil.rmtree(out)
        options = replace(STREAM, track=stopping(1))
        with pytest.raises(CutOff):
            compress(dense, recipe, out=out, windows=windows, options=options)
        compress(dense, recipe, out=out, windows=windows, options=STREAM, resume=True)
        found = load(out, dtype="auto").state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        shutil.rmtree(out)


def test_a_streamed_run_is_gone_on_with_there(tmp_path):
    on_far(_go_on, tmp_path)


def _one_at_a_time(folder: Path) -> None:
    dense = _dense(folder, tie_word_embeddings=True, num_hidden_layers=4)
    model = load_mapped(dense, device="far")
    blocks = list(model.model.layers)
    assert is_mapped(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.norm.weight, Far)
    assert [device_of(block).type for block in blocks] == ["far"] * 4

    def there() -> list[int]:
        return [n for n, block in enumerate(blocks) if isinstance(block.mlp.up_proj.weight, Far)]

    seen: list[list[int]] = []
    for block in blocks:
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(there()))
    ids = torch.arange(4, 20)[None]
    logits = model(ids.to("far")).logits
    assert seen == [[0], [1], [2], [3]]
    expected = load_model(parse_source(dense))(ids).logits
    torch.testing.assert_close(logits.inner, expected, rtol=1e-4, atol=1e-4)

    with staying(blocks[1]):
        weight = blocks[1].mlp.up_proj.weight
        model(ids.to("far"))
        assert there() == [1]
        assert blocks[1].mlp.up_proj.weight is weight
        with torch.no_grad():
            weight.add_(1)
    let_go(blocks[1])
    assert there() == []
    trained = blocks[1].mlp.up_proj.weight
    assert torch.equal(trained, weight.inner)
    assert is_mapped(blocks[3].mlp.up_proj)
    assert not is_mapped(blocks[1].mlp.up_proj)
    with staying(blocks[2]):
        other = blocks[2].mlp.up_proj.weight
        other.data = (other + 2).detach()  # which no version tells
    let_go(blocks[2])
    assert torch.equal(blocks[2].mlp.up_proj.weight, other.inner)

    last = weakref.ref(weight)
    del weight
    assert last() is None


def test_blocks_come_in_turns_and_what_is_trained_is_kept(tmp_path):
    on_far(_one_at_a_time, tmp_path)


def _families(folder: Path) -> None:
    ids = torch.arange(4, 28)[None].to("far")
    for family in models.CONFIGS:
        if family in EXPERTS:
            continue
        path = folder / family
        models.build(family).save_pretrained(path)
        whole, streamed = (
            open_model(parse_source(path), device="far", stream=stream) for stream in (False, True)
        )
        with torch.no_grad():
            expected, seen = (model(ids).logits for model in (whole, streamed))
        assert torch.equal(seen, expected), family
        (parts,) = (list(m) for m in streamed.modules() if isinstance(m, nn.ModuleList))
        assert len(parts) == 2, family
        for part in parts:
            let_go(part)
        assert not any(isinstance(p, Far) for part in parts for p in part.parameters()), family


def test_all_families_stream_there(tmp_path):
    on_far(_families, tmp_path)


def _fused_latents(folder: Path) -> None:
    dense = _dense(folder, "phi3")
    recipe = _recipe(RECIPES["latents"])
    for options in (FAR, STREAM):
        compress(
            dense, recipe, out=folder / str(options.stream), windows=_windows(), options=options
        )
    whole, streamed = (load(folder / str(s), dtype="auto").state_dict() for s in (False, True))
    assert all(torch.equal(whole[key], streamed[key]) for key in whole)


def test_fused_projections_are_split_there_too(tmp_path):
    on_far(_fused_latents, tmp_path)


def _without_float64(_: Path) -> None:
    there = torch.ones(2).to("far")
    with pytest.raises(TypeError):
        there.double()
    assert float64_device("far") == torch.device("cpu")
    assert in_float64(there).tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(2)


def test_the_stand_in_is_as_strict_as_the_real_thing(tmp_path):
    on_far(_without_float64, tmp_path, has_float64=False)


def _healed(folder: Path) -> None:
    """The one there is cut off, and goes on."""
    training.SPACING = 0.0
    recipe = {"method": "svd", "budget": {"param_ratio": 0.5}, "layout": "plain"}
    small = folder / "small"
    compress(_dense(folder), CompressionRecipe.from_dict(recipe), out=small)
    settings = {"learning_rate": 2e-3, "held_out_sequences": 4, "batch_sequences": 4}
    for kind, values in {"factors": {}, "adapters": ADAPTERS}.items():
        wanted = HealRecipe(**{**settings, **values})
        near, there = folder / f"near {kind}", folder / f"there {kind}"
        expected = heal(small, near, wanted, windows=_windows(16))
        go_on = partial(heal, small, there, wanted, windows=_windows(16), device="far", resume=True)
        with suppress(CutOff):
            go_on(track=stopping(2, ("healing",)))
        report = go_on()
        assert report.environment["device"].startswith("far")
        curves = [[check.divergence for check in x.checks] for x in (report, expected)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-3)
        assert report.kept_step == expected.kept_step > 0
        tensors = [load(out).state_dict() for out in (near, there)]
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensors[1][key], tensor, rtol=5e-3, atol=5e-3)


def test_a_healing_there_is_one_on_the_cpu(tmp_path):
    on_far(_healed, tmp_path)


def _other_forms(_: Path) -> None:
    inputs = torch.ones(1, 32, dtype=torch.bfloat16)
    for pivoted in (False, True):
        for change in (round_factors, remap_factors, None):
            linear = nn.Linear(32, 24, dtype=torch.bfloat16)
            factors = Factors(torch.randn(24, 6), torch.randn(6, 32))
            layer = LowRankLinear.from_factors(linear, factors, pivoted).to("far")
            made = layer.to_linear() if change is None else layer
            if change is not None:
                change(layer)
            assert {t.device.type for t in made.state_dict().values()} == {"far"}
            made(inputs.to("far"))
    rounded = Int8Linear.from_linear(nn.Linear(32, 24, dtype=torch.bfloat16).to("far"))
    rounded(inputs.to("far"))
    rounded.to_linear()(inputs.to("far"))


def test_other_forms_of_a_layer_stay_on_the_device(tmp_path):
    on_far(_other_forms, tmp_path, has_float64=False)


def _nothing(_: Path) -> None: ...


def test_what_never_came_there_is_told(tmp_path):
    with pytest.raises(AssertionError, match="nothing was done on the device"):
        on_far(_nothing, tmp_path)


@pytest.mark.parametrize("device", ["abacus", "mps", "meta"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_device_that_is_not_there_is_refused(device, stream, dense_folder, make_recipe, tmp_path):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    options = CompressionOptions(device=device, stream=stream)
    with pytest.raises(ModelError, match=f"cannot use device {device}: "):
        compress(dense_folder, make_recipe(), out=tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())
    require_device(None)
