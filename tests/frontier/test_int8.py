"""Factors in int8: the bytes and the function of the folder that `slimrank.quantize` writes."""

import pytest

import slimrank
from slimrank.checkpoint import folder_bytes, weight_file_bytes
from slimrank.errors import NumericalError
from slimrank.frontier import cells, making, measure_frontier
from slimrank.frontier.int8 import round_low_rank


@pytest.fixture
def make_rounded(make_bench):
    """`make_rounded(**overrides)`: a benchmark of one size, without the dense model, with int8."""

    def make(**overrides):
        return make_bench(**{"dense": False, "keep": [0.6], "int8_factors": True, **overrides})

    return make


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_a_row_is_what_quantize_writes(
    layout, make_rounded, dense_folder, linear_bytes, perplexity_alone, tmp_path
):
    bench = make_rounded()
    bench = make_rounded(base={**bench.base, "layout": layout})
    exact, row = measure_frontier(bench, tmp_path / "out").runs
    assert (exact.name, row.name) == ("base @ 0.6", "base @ 0.6, int8")
    assert (exact.int8_factors, row.int8_factors) == (False, True)
    recipe = cells(bench)[1].recipe
    compressed = slimrank.compress(dense_folder, recipe, out=tmp_path / "floats")
    slimrank.quantize(tmp_path / "floats", tmp_path / "codes")
    assert exact.bytes == weight_file_bytes(tmp_path / "floats")
    assert row.bytes == weight_file_bytes(tmp_path / "codes") < exact.bytes
    assert row.linear_bytes == linear_bytes(tmp_path / "codes", compressed)
    alone = perplexity_alone(tmp_path / "codes", bench.texts["near"].path).value
    assert row.perplexity["near"].value == pytest.approx(alone, rel=1e-6)
    assert row.perplexity["near"].value != exact.perplexity["near"].value
    assert alone == pytest.approx(exact.perplexity["near"].value, rel=0.02)
    same = ("recipe", "keep", "params", "target_params", "layout", "method", "is_dense")
    assert row.model_dump(include={*same}) == exact.model_dump(include={*same})
    assert row.seconds > exact.seconds
    assert row.peak_bytes >= exact.peak_bytes


def test_both_rows_are_of_one_compression_and_of_a_file_each(make_rounded, tmp_path, calls):
    made, _ = calls
    first = measure_frontier(make_rounded(keep=[0.8, 0.6]), tmp_path / "out")
    assert made == ["base @ 0.8", "base @ 0.6"]
    assert len({run.perplexity["near"].value for run in first.runs}) == 4
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4
    again = measure_frontier(make_rounded(keep=[0.8, 0.6]), tmp_path / "out")
    assert again.runs == first.runs
    assert len(made) == 2


def test_a_row_can_be_made_alone(make_rounded, tmp_path, calls):
    made, _ = calls
    (before,) = measure_frontier(make_rounded(int8_factors=False), tmp_path / "out").runs
    kept, row = measure_frontier(make_rounded(), tmp_path / "out").runs
    assert made == ["base @ 0.6", "base @ 0.6, int8"]
    assert kept.model_copy(update={"pareto": before.pareto}) == before
    _, beside = measure_frontier(make_rounded(), tmp_path / "other").runs
    assert made[2:] == ["base @ 0.6"]
    figures = {"bytes", "linear_bytes", "params", "perplexity"}
    assert row.model_dump(include=figures) == beside.model_dump(include=figures)


def test_only_the_model_of_the_row_before_is_rounded(make_rounded, tmp_path, calls, monkeypatch):
    made, _ = calls
    rounded = making.round_low_rank

    def fail_once(model):
        monkeypatch.setattr(making, "round_low_rank", rounded)
        raise NumericalError("not finite")

    monkeypatch.setattr(making, "round_low_rank", fail_once)
    bench = make_rounded(keep=[0.8, 0.6])
    exact, bad, *_ = measure_frontier(bench, tmp_path / "out").runs
    assert (exact.error, bad.error) == (None, "not finite")
    assert len(made) == 2
    runs = measure_frontier(bench, tmp_path / "out").runs
    assert [run.error for run in runs] == [None] * 4
    assert made[2:] == ["base @ 0.8, int8"]
    assert runs[1].bytes > runs[3].bytes


def test_without_factors_there_is_an_error_in_the_row(make_rounded, tmp_path):
    said = []
    exact, bad = measure_frontier(make_rounded(keep=[1.0]), tmp_path / "out", say=said.append).runs
    assert exact.error is None
    assert bad.error.startswith("no linear was factorised, so there are no factors to put into")
    assert (bad.bytes, bad.perplexity, bad.int8_factors) == (0, {}, True)
    assert said[-1] == f"base @ 1, int8: failed: {bad.error}"


@pytest.mark.parametrize("family", ["qwen2_tied", "phi3"])
def test_bytes_of_tied_and_of_fused_linears(family, make_compressed, tmp_path):
    model, _ = make_compressed(family, kv_cache={"keep": 0.5}, ignore=["down_proj"])
    model.save_pretrained(tmp_path / "floats")
    slimrank.quantize(tmp_path / "floats", tmp_path / "codes")
    round_low_rank(model)
    assert folder_bytes(model, aligned=True) == weight_file_bytes(tmp_path / "codes")
