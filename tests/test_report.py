"""Reports read back as they were written, and refuse what they were not."""

import json
import math

import pytest
from pydantic import ValidationError

from slimrank import CompressionReport
from slimrank.errors import CheckpointError
from slimrank.report import (
    AllocationReport,
    ImportanceWeightTrial,
    KVCacheReport,
    QuantizationReport,
    RefinementEpoch,
    RefinementReport,
    SizeReport,
)

SIZE = {
    "target_params_before": 1000,
    "target_params": 755,
    "model_params_before": 2000,
    "model_params": 1755,
    "weight_bytes_before": 8_000_000,
    "weight_bytes": 7_020_000,
    "int8_bytes": 5_000_000,
}


@pytest.fixture(scope="module")
def report(make_compressed):
    return make_compressed("qwen2")[1]


def test_round_trip(report):
    text = report.model_dump_json()
    again = CompressionReport.from_json(text, "report.json")
    assert again == report
    assert again.model_dump_json() == text
    assert CompressionReport.from_json(report.model_dump_json(indent=2), "r") == report


def test_every_figure_is_finite(report):
    for linear in report.linears:
        for value in linear.model_dump().values():
            assert not isinstance(value, float) or math.isfinite(value)
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.peak_bytes > 1_000_000


def test_what_a_run_leaves_behind(report):
    assert {"slimrank", "torch", "transformers", "python", "device", "dtype"} <= set(
        report.environment
    )
    assert report.environment["device"] == "cpu"
    assert {"load", "calibrate", "solve", "check"} <= set(report.seconds)
    assert len(report.calibration_fingerprint) == 64
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"extra": 1}, "extra"),
        ({"tokens": "many"}, "tokens"),
        ({"size": None}, "size"),
        ({"linears": [{"name": "x"}]}, r"linears\.0\.rank"),
        ({"recipe": {"budget": {"param_ratio": 7}}}, "recipe"),
    ],
)
def test_a_changed_report_is_refused_by_key(report, change, key):
    values = json.loads(report.model_dump_json()) | change
    with pytest.raises(CheckpointError, match=f"here is no report: {key}"):
        CompressionReport.from_json(json.dumps(values), "here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1"])
def test_what_is_no_report(text):
    with pytest.raises(CheckpointError, match="here is no report"):
        CompressionReport.from_json(text, "here")


def test_a_report_is_frozen(report):
    with pytest.raises(ValidationError):
        report.tokens = 5


def test_the_line_says_both_ways_of_counting():
    assert SizeReport(**SIZE).line() == (
        "kept 75.5 % (removed 24.5 %) of the targeted linears, 87.8 % (12.2 %) of the whole model; "
        "8.0 -> 7.0 MB on disk (int8 of the dense model: 5.0 MB)"
    )


def test_a_report_from_before_dynamic_ranks_still_loads(report):
    """Version 0.1 wrote no allocation, no cache, and fewer settings into its recipe."""
    values = json.loads(report.model_dump_json())
    del values["allocation"], values["kv_cache"]
    del values["recipe"]["swift"], values["recipe"]["kv_cache"]
    del values["recipe"]["calibration"]["held_out_sequences"]
    assert CompressionReport.from_json(json.dumps(values), "r") == report


def test_a_report_of_a_search_reads_back(report):
    trials = tuple(
        ImportanceWeightTrial(importance_weight=w / 10, perplexity=20 - w) for w in range(11)
    )
    allocation = AllocationReport(
        importance_weight=1.0, retained_share=0.5, trials=trials, uniform_perplexity=12.5
    )
    cache = KVCacheReport(dense_values=64, latent_values=32, value_bytes=2)
    full = report.model_copy(update={"allocation": allocation, "kv_cache": cache})
    assert CompressionReport.from_json(full.model_dump_json(), "r") == full


@pytest.mark.parametrize(
    ("start_held_out", "held_out", "course"),
    [(0.75, (0.5, 0.6), (0.75, 0.5, 0.6)), (None, (None, None), (0.8, 0.3, 0.2))],
    ids=["held out", "calibration"],
)
def test_a_kept_loss_is_held_out_where_text_is(start_held_out, held_out, course):
    epochs = tuple(
        RefinementEpoch(loss=loss, held_out_loss=other, seconds=1.0)
        for loss, other in zip((0.3, 0.2), held_out, strict=True)
    )
    values = {"start_loss": 0.8, "start_held_out_loss": start_held_out, "epochs": epochs}
    values |= {"trained_params": 1, "seconds": 2.0}
    for kept, loss in enumerate(course):
        found = RefinementReport(kept_epoch=kept, **values)
        assert (found.course, found.kept_loss) == (course, loss)
        assert RefinementReport.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_params_before", 0),
        ("model_params_before", 0),
        ("weight_bytes", -1),
        ("int8_bytes", 2**63),
    ],
)
def test_sizes_that_cannot_be(report, key, value):
    values = json.loads(report.model_dump_json())
    values["size"][key] = value
    with pytest.raises(CheckpointError, match=rf"report: size\.{key}: "):
        CompressionReport.from_json(json.dumps(values), "report")


def test_a_kept_epoch_has_run():
    values = {"epochs": (), "trained_params": 1, "seconds": 0.0}
    losses = {"start_loss": 1.0, "start_held_out_loss": None}
    assert RefinementReport(kept_epoch=0, **losses, **values).kept_loss == 1.0
    with pytest.raises(ValidationError, match="epoch 1 was kept, but did not run"):
        RefinementReport(kept_epoch=1, **losses, **values)


def test_a_rounding_is_of_some_linears():
    with pytest.raises(ValidationError, match="linears"):
        QuantizationReport(source="m", bits=8, linears=(), weight_bytes_before=2, weight_bytes=1)
