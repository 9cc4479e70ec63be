"""Every figure is the one that the parts give alone; what is finished is not done again."""

import json
import sys

import pytest
import torch

import slimrank
from slimrank.checkpoint import weight_file_bytes
from slimrank.errors import CheckpointError, SlimrankError, SlimrankWarning, TextError
from slimrank.frontier import FrontierReport, cells, making, measure_frontier, run
from slimrank.source import load_model, parse_source

LOW_RANK = ["base @ 0.8", "base @ 0.6"]


def by_name(report):
    return {row.name: row for row in report.runs}


@pytest.mark.parametrize("method", ["svd", "swift-svd", "aa-svd"])
def test_a_row_is_what_compress_and_evaluate_give(
    method, make_bench, dense_folder, linear_bytes, perplexity_alone, tmp_path
):
    bench = make_bench(keep=[0.6], base={**make_bench().base, "method": method})
    row = by_name(measure_frontier(bench, tmp_path / "out"))["base @ 0.6"]
    recipe = next(cell.recipe for cell in cells(bench) if cell.recipe)
    report = slimrank.compress(dense_folder, recipe, out=tmp_path / "alone")
    assert (row.bytes, row.params) == (report.size.weight_bytes, report.size.model_params)
    assert row.bytes == weight_file_bytes(tmp_path / "alone")
    assert row.target_params == report.size.target_params
    assert row.linear_bytes == linear_bytes(tmp_path / "alone", report)
    for text in ("near", "far"):
        alone = perplexity_alone(tmp_path / "alone", bench.texts[text].path)
        assert row.perplexity[text].value == pytest.approx(alone.value, rel=1e-4)
        assert row.perplexity[text].tokens == alone.tokens
        assert row.perplexity[text].in_domain == (text == "near")
    assert (row.method, row.keep, row.refine, row.is_dense) == (method, 0.6, "off", False)
    assert row.recipe == recipe.model_dump(mode="json")
    assert row.seconds > 0
    assert row.peak_bytes > 0


def test_the_dense_row_and_the_order(make_bench, dense_folder, tmp_path):
    report = measure_frontier(make_bench(), tmp_path / "out")
    assert [row.name for row in report.runs] == ["dense", "base @ 0.8", "base @ 0.6"]
    dense, *low = report.runs
    assert dense.bytes == weight_file_bytes(dense_folder)
    assert dense.is_dense
    assert dense.params == sum(
        p.numel() for p in load_model(parse_source(dense_folder)).parameters()
    )
    for row in low:
        assert row.target_params <= row.keep * dense.target_params
        assert dense.bytes - row.bytes == pytest.approx(
            dense.linear_bytes - row.linear_bytes, abs=4096
        )
    assert report.runs[2].pareto


def test_the_file_has_the_schema_and_nothing_else(make_bench, tmp_path):
    measure_frontier(make_bench(), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert set(found) == {"schema", "model", "environment", "date", "settings", "runs"}
    assert found["schema"] == 1
    assert set(found["runs"][1]) == {
        *("name", "recipe", "keep", "layout", "method", "allocation", "refine", "bytes"),
        *("linear_bytes", "params", "target_params", "perplexity", "accuracy", "seconds"),
        *("peak_bytes", "is_dense", "int8_factors", "pareto", "error"),
    }
    assert set(found["runs"][1]["perplexity"]["near"]) == {"value", "tokens", "in_domain"}
    assert found["settings"]["texts"]["near"]["tokens"] == 256
    assert [row.pop("int8_factors") for row in found["runs"]] == [False] * 3
    older = FrontierReport.model_validate(found)
    assert [row.int8_factors for row in older.runs] == [False] * 3


def test_a_second_call_makes_nothing(make_bench, tmp_path, calls):
    made, profiled = calls
    first = measure_frontier(make_bench(), tmp_path / "out")
    assert (made, len(profiled)) == (["dense", "base @ 0.8", "base @ 0.6"], 1)
    again = measure_frontier(make_bench(), tmp_path / "out")
    assert len(made) == 3
    assert again.runs == first.runs
    more = measure_frontier(make_bench(keep=[0.8, 0.6, 0.4]), tmp_path / "out")
    assert made[3:] == ["base @ 0.4"]
    assert len(profiled) == 1
    assert more.runs[:3] == tuple(
        row.model_copy(update={"pareto": more.runs[n].pareto}) for n, row in enumerate(first.runs)
    )


def test_a_run_that_is_cut_off_goes_on(make_bench, tmp_path, calls, monkeypatch):
    made, _ = calls
    make = run.make

    def cut_off(cell, *rest):
        if cell.name == "base @ 0.6":
            raise KeyboardInterrupt
        return make(cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "make", cut_off)
        with pytest.raises(KeyboardInterrupt):
            measure_frontier(make_bench(), tmp_path / "out")
    so_far = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [row["name"] for row in so_far["runs"]] == ["dense", "base @ 0.8"]
    assert len(measure_frontier(make_bench(), tmp_path / "out").runs) == 3
    assert made == ["dense", "base @ 0.8", "base @ 0.6"]


@pytest.mark.parametrize(
    ("change", "redone", "profiles"),
    [
        ({"seed": 1}, LOW_RANK, 1),
        ({"windows": {"length": 64, "number": 3}}, ["dense", *LOW_RANK], 0),
        ({"model": "other"}, ["dense", *LOW_RANK], 1),
        ({"text": "changed"}, ["dense", *LOW_RANK], 0),
        ({"calibration": "changed"}, LOW_RANK, 1),
    ],
)
def test_what_decides_a_figure_is_in_its_key(
    change, redone, profiles, make_bench, make_folder, text_file, tmp_path, calls
):
    made, profiled = calls
    own = tmp_path / "calibration.txt"
    own.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    base = {"calibration": {**make_bench().base["calibration"], "source": [str(own)]}}
    measure_frontier(make_bench(base=base), tmp_path / "out")
    made.clear()
    profiled.clear()
    if "text" in change or "calibration" in change:
        path = tmp_path / "far.txt" if "text" in change else own
        path.write_text("changed " + path.read_text(encoding="utf-8"), encoding="utf-8")
        change = {}
    if "model" in change:
        change = {"model": str(make_folder("llama", seed=1))}
    measure_frontier(make_bench(base=base, **change), tmp_path / "out")
    assert (made, len(profiled)) == (redone, profiles)


def test_marks_that_decide_no_figure_are_not(make_bench, values, tmp_path, calls):
    made, _ = calls
    measure_frontier(make_bench(), tmp_path / "out")
    texts = {name: {**text, "in_domain": True} for name, text in values["texts"].items()}
    report = measure_frontier(make_bench(texts=texts), tmp_path / "out")
    assert len(made) == 3
    assert report.runs[0].perplexity["far"].in_domain


def test_a_damaged_result_is_measured_anew_with_a_warning(make_bench, tmp_path, calls):
    made, _ = calls
    before = measure_frontier(make_bench(keep=[0.6]), tmp_path / "out")
    for path in (tmp_path / "out" / "runs").iterdir():
        path.write_bytes(path.read_bytes().replace(b'"tokens": 2', b'"tokens": 3'))
    with pytest.warns(SlimrankWarning, match="is damaged.*it is measured anew"):
        after = measure_frontier(make_bench(keep=[0.6]), tmp_path / "out")
    assert len(made) == 4
    assert after.runs[1].perplexity == before.runs[1].perplexity


def test_a_damaged_profile_is_made_anew_with_a_warning(make_bench, tmp_path, calls):
    _, profiled = calls
    measure_frontier(make_bench(keep=[0.6]), tmp_path / "out")
    (path,) = (tmp_path / "out" / "profiles").glob("*/profile.json")
    path.write_text("{}")
    with pytest.warns(SlimrankWarning, match="it is made anew"):
        measure_frontier(make_bench(keep=[0.5]), tmp_path / "out")
    assert len(profiled) == 2


def test_a_failing_cell_is_a_row_and_is_tried_again(make_bench, tmp_path, calls):
    made, _ = calls
    said = []
    bench = make_bench(keep=[0.8, 0.001], dense=False)
    report = measure_frontier(bench, tmp_path / "out", say=said.append)
    good, bad = report.runs
    assert good.error is None
    assert "0.001" in bad.error or "budget" in bad.error
    assert (bad.keep, bad.bytes, bad.perplexity, bad.pareto) == (0.001, 0, {}, False)
    assert any("base @ 0.001: failed" in line for line in said)
    measure_frontier(bench, tmp_path / "out")
    assert made == ["base @ 0.8", "base @ 0.001", "base @ 0.001"]


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_what_torch_raises_fails_its_cell_only(kind, make_bench, tmp_path, monkeypatch):
    compress = making.compress

    def broken(model, recipe, **named):
        if recipe.budget.param_ratio == 0.8:
            raise kind("out of memory")
        return compress(model, recipe, **named)

    monkeypatch.setattr(making, "compress", broken)
    _, bad, good = measure_frontier(make_bench(), tmp_path / "out").runs
    assert bad.error == f"{kind.__name__}: out of memory"
    assert good.error is None


def test_a_calibration_text_that_is_too_short_fails_alike_for_all(make_bench, tmp_path):
    base = make_bench().base
    base = {"calibration": {**base["calibration"], "num_sequences": 10_000}}
    _, *low = measure_frontier(make_bench(base=base), tmp_path / "out").runs
    assert all("for all methods to see the same; ask for fewer" in row.error for row in low)


def test_the_dense_model_is_never_changed(make_bench, tmp_path, monkeypatch):
    seen = []
    make = run.make

    def look(cell, dense, *rest):
        made = make(cell, dense, *rest)
        seen.append({k: v.clone() for k, v in dense.model.state_dict().items()})
        return made

    monkeypatch.setattr(run, "make", look)
    grid = {"method": ["svd", "swift-svd", "aa-svd"]}
    measure_frontier(make_bench(grid=grid, keep=[0.6]), tmp_path / "out")
    assert len(seen) == 4
    for state in seen[1:]:
        assert state.keys() == seen[0].keys()
        assert all(torch.equal(value, seen[0][key]) for key, value in state.items())


def test_one_profile_serves_sizes_allocations_and_orders(make_bench, tmp_path, calls):
    _, profiled = calls
    base = {**make_bench().base, "swift": {"importance_weight": 0.5}, "allocation": "swift"}
    runs = [
        {"name": "even", "recipe": {"allocation": "uniform", "swift": {"importance_weight": None}}},
        {"name": "svd", "recipe": {"method": "svd"}},
        {"name": "anchored", "recipe": {"method": "aa-svd"}},
    ]
    report = measure_frontier(make_bench(base=base, runs=runs, grid={}), tmp_path / "out")
    assert [row.error for row in report.runs] == [None] * 9
    assert len(profiled) == 1


def test_threshold_ranks_of_all_sizes_are_from_one_profile(make_bench, tmp_path, calls):
    _, profiled = calls
    base = {**make_bench().base, "allocation": "threshold"}
    runs = [{"name": "svd", "recipe": {"method": "svd"}}, {"name": "swift", "recipe": {}}]
    report = measure_frontier(make_bench(base=base, runs=runs, grid={}), tmp_path / "out")
    assert [row.error for row in report.runs] == [None] * len(report.runs)
    assert {row.allocation for row in report.runs} == {"threshold", "none"}
    assert len(profiled) == 1


def test_folders_that_are_not_ours(make_bench, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds mine.txt and no runs; name an empty folder"):
        measure_frontier(make_bench(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot write"):
        measure_frontier(make_bench(), tmp_path / "out" / "mine.txt")


def test_what_a_killed_process_left_is_removed(make_bench, tmp_path):
    run.ResultStore.open(tmp_path / "out").close()
    half = tmp_path / "out" / "profiles" / ".0a.partial-x"
    half.mkdir()
    (half / "spectra.safetensors").write_text("half")
    (tmp_path / "out" / "runs" / "0a.json.partial").write_text("half")
    run.ResultStore.open(tmp_path / "out").close()
    for folder in ("profiles", "runs"):
        assert list((tmp_path / "out" / folder).iterdir()) == []


def test_two_processes_do_not_share_a_folder(make_bench, tmp_path):
    with (
        run.ResultStore.open(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another process works on"),
    ):
        measure_frontier(make_bench(), tmp_path / "out")


def test_texts_that_do_not_do(make_bench, values, tmp_path):
    texts = {"gone": {"path": str(tmp_path / "gone")}}
    with pytest.raises(TextError, match="text 'gone': no such file"):
        measure_frontier(make_bench(texts=texts), tmp_path / "out")
    with pytest.raises(TextError, match="text 'near': 900 windows were asked for"):
        measure_frontier(make_bench(windows={"length": 64, "number": 900}), tmp_path / "out")


@pytest.mark.parametrize(
    ("module", "change", "extra"),
    [
        ("torchao.quantization", {"int8": True}, "quant"),
        ("lm_eval", {"zero_shot": {"folder": "f", "tasks": ["a"]}}, "eval"),
    ],
)
def test_a_missing_package_is_named_before_any_work(
    module, change, extra, make_bench, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SlimrankError, match=rf"pip install 'slimrank\[{extra}\]'"):
        measure_frontier(make_bench(**change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_is_small_and_near_the_dense_model(make_bench, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    dense, int8 = measure_frontier(make_bench(keep=[], int8=True), tmp_path / "out").runs
    assert (int8.method, int8.is_dense, int8.target_params) == ("int8", True, dense.target_params)
    codes = dense.target_params  # one byte each, and a scale of four bytes for each output
    assert codes < int8.linear_bytes < codes * (1 + 4 / 32) + 1
    assert dense.bytes - int8.bytes == dense.linear_bytes - int8.linear_bytes
    assert int8.perplexity["near"].value != dense.perplexity["near"].value
    assert int8.perplexity["near"].value == pytest.approx(dense.perplexity["near"].value, rel=0.05)


def test_zero_shot_figures_are_in_the_row(make_bench, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [{"context": f"a{n}", "choices": [" b", " cd"], "gold": n % 2} for n in range(6)]
    (tmp_path / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"folder": str(tmp_path), "tasks": ["ask"], "limit": 5}
    report = measure_frontier(make_bench(zero_shot=asked, keep=[0.5]), tmp_path / "out")
    for row in report.runs:
        assert row.accuracy["ask"].n == 5
        assert 0 <= row.accuracy["ask"].value <= 1
        assert row.accuracy["ask"].stderr >= 0
