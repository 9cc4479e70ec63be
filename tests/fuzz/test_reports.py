"""Reports of compressions, quantisations and benchmarks, and the pages made of them."""

import json

import pytest
from hypothesis import given

from fuzz.mutation import as_json, mutated, spoiled
from fuzz.properties import examples, nothing_else_touched, right_or_refused, run
from slimrank.checkpoint import read_healing, read_quantization, read_report
from slimrank.depth_plot import read_depths
from slimrank.pages import read_shown, render
from slimrank.recipe import HealRecipe
from slimrank.report import (
    AllocationReport,
    HealCheck,
    HealReport,
    ImportanceWeightTrial,
    KVCacheReport,
    LinearReport,
    QuantizationReport,
    QuantizedLinear,
    RefinementEpoch,
    RefinementReport,
)
from tiny import depths

EPOCHS = (RefinementEpoch(loss=0.4, held_out_loss=0.5, seconds=1.0),)
TRAINING = RefinementReport(
    start_loss=0.5,
    start_held_out_loss=0.6,
    epochs=EPOCHS,
    kept_epoch=1,
    trained_params=10,
    seconds=1.0,
)
TRIALS = (ImportanceWeightTrial(importance_weight=0.5, perplexity=3.0),)
LINEAR = LinearReport(
    name="model.layers.0.mlp.up_proj", rank=4, params_before=100, params=40, tokens=5
)
BY_HAND = depths.build([0.1, 0.2], [0.2, 0.3], [0.3, 0.4])
REPORT = BY_HAND.model_copy(
    update={
        "linears": (
            LINEAR,
            LINEAR.model_copy(update={"name": "model.layers.1.mlp.up_proj", "rank": None}),
        ),
        "blocks": tuple(b.model_copy(update={"refinement": TRAINING}) for b in BY_HAND.blocks),
        "tuning": TRAINING,
        "allocation": AllocationReport(
            importance_weight=0.5, retained_share=0.5, trials=TRIALS, uniform_perplexity=4.0
        ),
        "kv_cache": KVCacheReport(dense_values=100, latent_values=50, value_bytes=2),
        "seconds": {"load": 1.0},
    }
)
QUANTIZATION = QuantizationReport(
    source="m",
    bits=8,
    linears=(
        QuantizedLinear(
            name="a.b",
            rank=2,
            bytes_before=64,
            bytes_after=40,
            rounding_loss=0.002,
            truncation_loss=0.3,
        ),
    ),
    weight_bytes_before=200,
    weight_bytes=100,
    perplexity_before=2.0,
    perplexity=3.0,
)

HEALING = HealReport(
    source="m",
    teacher="d",
    recipe=HealRecipe(),
    text_fingerprint="a",
    tokens=100,
    held_out_tokens=20,
    trained_params=10,
    steps=2,
    checks=(
        HealCheck(step=0, tokens=0, seconds=0.0, divergence=0.5, perplexity=9.0),
        HealCheck(step=2, tokens=100, seconds=1.0, divergence=0.4, perplexity=8.0),
    ),
    kept_step=2,
    divergence=0.4,
    perplexity=8.0,
    teacher_perplexity=5.0,
    weight_bytes=100,
    seconds={"train": 1.0},
    peak_bytes=100,
    environment={"torch": "2"},
)


def row(name, keep, method, is_dense=False):
    return {
        "name": name,
        "recipe": {"method": method, "budget": {"param_ratio": keep}},
        "keep": keep,
        "layout": "auto",
        "method": method,
        "allocation": "uniform",
        "refine": "off",
        "bytes": int(100 * keep),
        "params": 50,
        "perplexity": {"a": {"value": 11.0 - keep, "tokens": 100, "in_domain": False}},
        "accuracy": {"t": {"value": 0.5, "stderr": 0.1, "n": 10}},
        "seconds": 1.0,
        "is_dense": is_dense,
        "error": None,
    }


RUNS = [row(f"{m} {keep}", keep, m) for keep in (0.8, 0.6) for m in ("svd", "swift-svd")]
FRONTIER = {
    "schema": 1,
    "model": "m",
    "environment": {"torch": "2"},
    "settings": {"texts": {"a": {"in_domain": False}}},
    "runs": [row("dense", 1.0, "dense", is_dense=True), *RUNS],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


def show(folder, content):
    """Read and show a report in every way there is."""
    path = folder / "report.json"
    path.write_bytes(content)
    with nothing_else_touched(folder):
        report = right_or_refused(lambda: read_report(folder), path)
        if report is not None:
            assert "<script" not in render(read_shown(folder))
            right_or_refused(lambda: read_depths([folder]), folder)


@examples(20)
@given(tree=mutated(REPORT.model_dump(mode="json")))
def test_changed_reports(folder, tree):
    show(folder, as_json(tree))


@examples(12)
@given(content=spoiled(REPORT.model_dump_json().encode()))
def test_spoiled_reports(folder, content):
    show(folder, content)


@examples(20)
@given(tree=mutated(QUANTIZATION.model_dump(mode="json")))
def test_changed_quantisations(folder, tree):
    path = folder / "quantize.json"
    path.write_bytes(as_json(tree))
    found = right_or_refused(lambda: read_quantization(folder), path)
    if found is not None:
        assert found.line()


@examples(10)
@given(content=spoiled(QUANTIZATION.model_dump_json().encode()))
def test_spoiled_quantisations(folder, content):
    (folder / "quantize.json").write_bytes(content)
    right_or_refused(lambda: read_quantization(folder), folder)


@examples(20)
@given(tree=mutated(HEALING.model_dump(mode="json")))
def test_changed_healings(folder, tree):
    path = folder / "heal.json"
    path.write_bytes(as_json(tree))
    found = right_or_refused(lambda: read_healing(folder), path)
    if found is not None:
        assert found.line()


@examples(20)
@given(tree=mutated(FRONTIER))
def test_changed_frontiers(tmp_path_factory, folder, tree):
    place = folder / "frontier"
    place.mkdir(exist_ok=True)
    (place / "frontier.json").write_bytes(as_json(tree))
    shown = right_or_refused(lambda: read_shown(place), place)
    if shown is not None:
        assert "<script" not in render(shown)


@examples(10)
@given(content=spoiled(json.dumps(FRONTIER).encode()))
def test_spoiled_frontiers(folder, content):
    place = folder / "frontier"
    place.mkdir(exist_ok=True)
    (place / "frontier.json").write_bytes(content)
    right_or_refused(lambda: render(read_shown(place)), place)


@examples(10)
@given(tree=mutated(REPORT.model_dump(mode="json")))
def test_commands_on_changed_reports(folder, tree):
    (folder / "report.json").write_bytes(as_json(tree))
    run("depth", folder)
    run("report", folder, "--force")
