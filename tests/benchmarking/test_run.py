"""Models take turns, each in a process of its own, and every figure is one that was measured."""

import os
import shutil
import signal

import pytest
import torch

from slimrank import benchmark, compress
from slimrank.benchmarking.process import Worker
from slimrank.benchmarking.run import _cases
from slimrank.checkpoint import load
from slimrank.errors import ModelError, ProcessError, RecipeError
from slimrank.source import load_model, parse_source


@pytest.fixture(scope="module")
def report(compressed_folder, dense_folder):
    return benchmark(
        compressed_folder,
        against=[dense_folder],
        batches=(2, 1),
        contexts=(9, 5),
        new_tokens=3,
        rounds=2,
        threads=1,
    )


def test_every_pair_is_measured_from_small_to_large(report):
    for model in report.models:
        assert [(c.batch, c.context) for c in model.cases] == [(1, 5), (1, 9), (2, 5), (2, 9)]
        for case in model.cases:
            assert len(case.prefill_seconds) == len(case.decode_seconds) == 2
            assert min(case.prefill_seconds + case.decode_seconds) > 0
        peaks = [case.peak_bytes for case in model.cases]
        assert peaks == sorted(peaks)
        assert model.before_bytes <= peaks[0]


def test_rates_are_tokens_over_the_median_second(report):
    case = (
        report.models[1]
        .cases[3]
        .model_copy(update={"prefill_seconds": (3.0, 1.0, 2.0), "decode_seconds": (0.5, 0.1)})
    )
    assert case.prefill_rate == 2 * 9 / 2.0
    assert case.decode_rate == 2 / 0.3


def test_memory_is_that_of_the_models(report, compressed_folder, dense_folder):
    compressed, dense = report.models
    model = load_model(parse_source(dense_folder))
    for figures, held in ((dense, model), (compressed, load(compressed_folder))):
        assert figures.weight_bytes == sum(t.nbytes for t in [*held.parameters(), *held.buffers()])
    assert compressed.weight_bytes < dense.weight_bytes
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert [case.cache_bytes for case in dense.cases] == [4 * values * n for n in (5, 9, 10, 18)]


def test_rows_hold_the_first_against_the_others(report):
    rows = list(report.rows())
    assert [model for _, model, _, _ in rows] == [*report.models] * 4
    case, _, prefill, decode = rows[3]
    mine = report.models[0].cases[1]
    assert prefill == mine.prefill_rate / case.prefill_rate
    assert decode == mine.decode_rate / case.decode_rate
    assert rows[2][2:] == (None, None)


def test_it_runs_where_it_is_told(report):
    assert report.environment["threads"] == "1"
    assert report.environment["device"] == "cpu"
    assert {model.dtype for model in report.models} == {"float32"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_an_ordinary_cache_of_fixed_length(
    dense_folder, make_recipe, tmp_path, report
):
    recipe = make_recipe(keep=0.9, kv_cache={"keep": 0.5})
    compress(dense_folder, recipe, out=tmp_path / "out")
    found = benchmark(
        tmp_path / "out", batches=[2], contexts=[5, 9], new_tokens=3, rounds=1, compiled=True
    )
    assert found.compiled
    assert not report.compiled
    each = report.models[1].cases[0].cache_bytes // 5  # of a token, keys and values, no latents
    held = [case.cache_bytes for case in found.models[0].cases]
    assert held == [2 * each * (5 + 3), 2 * each * (9 + 3)]


def test_a_compiler_that_is_missing_is_named(dense_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(ModelError, match="compiler"):
        benchmark(dense_folder, batches=[1], contexts=[4], new_tokens=1, rounds=1, compiled=True)


@pytest.fixture(scope="module")
def halves(dense_folder):
    """Another dtype, and nothing said about threads."""
    return benchmark(
        dense_folder, batches=[1], contexts=[4], new_tokens=1, rounds=1, dtype="bfloat16"
    )


def test_another_dtype_is_taken(halves, report):
    assert halves.models[0].dtype == "bfloat16"
    (wide,) = (c for c in report.models[1].cases if (c.batch, c.context) == (1, 5))
    assert 5 * halves.models[0].cases[0].cache_bytes == 4 * wide.cache_bytes / 2


def test_latents_are_counted_as_what_they_take(dense_folder, make_recipe, tmp_path):
    recipe = make_recipe(keep=0.9, kv_cache={"keep": 0.5})
    report = compress(dense_folder, recipe, out=tmp_path / "latents")
    found = benchmark(
        tmp_path / "latents", against=[dense_folder], batches=[2], contexts=[50], rounds=1
    )
    latents, dense = (model.cases[0].cache_bytes for model in found.models)
    assert report.kv_cache is not None
    numbers = 2 * 50 * report.kv_cache.latent_values
    assert 4 * numbers <= latents < dense  # positions are kept beside them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": []}, "nothing to measure"),
        ({"batches": [0]}, "batch is 0"),
        ({"contexts": [4, -1]}, "context is -1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"new_tokens": 0}, "new tokens is 0"),
        ({"threads": 10_000}, "threads is 10000; there are"),
    ],
)
def test_impossible_numbers_are_refused_before_any_work(settings, message, monkeypatch):
    monkeypatch.setattr("slimrank.benchmarking.run.Worker", None)
    with pytest.raises(RecipeError, match=message):
        benchmark("nowhere", **settings)


def test_a_model_that_is_not_there_is_named(dense_folder, tmp_path):
    with pytest.raises(ModelError, match="missing"):
        benchmark(dense_folder, against=[tmp_path / "missing"])


def test_a_context_beyond_the_model_is_refused(dense_folder):
    with pytest.raises(ModelError, match="made for 128 tokens, and 129 are asked for"):
        benchmark(dense_folder, batches=[1], contexts=[125], new_tokens=4)


def test_a_process_that_is_killed_is_named(dense_folder):
    worker = Worker(str(dense_folder), 1)
    try:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(ProcessError, match="it was killed, as is done where memory is short"):
            worker.ask("warm_up", batch=1, context=1)
    finally:
        worker.end()


def test_a_process_that_breaks_says_why(dense_folder):
    worker = Worker(str(dense_folder), 1)
    try:
        with pytest.raises(ProcessError, match="KeyError: 'dance'"):
            worker.ask("dance")
    finally:
        worker.end()


def test_no_process_stays(dense_folder, monkeypatch):
    made: list[Worker] = []

    class Seen(Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def ask(self, do, **order):
            if do == "run":
                raise KeyboardInterrupt
            return super().ask(do, **order)

    monkeypatch.setattr("slimrank.benchmarking.run.Worker", Seen)
    with pytest.raises(KeyboardInterrupt):
        benchmark(dense_folder, batches=[1], contexts=[4], threads=1)
    assert [worker._process.returncode for worker in made] == [-signal.SIGKILL]


def test_cases_are_in_the_order_of_their_tokens():
    assert _cases((1, 8), (512, 16, 16)) == [(1, 16), (8, 16), (1, 512), (8, 512)]


def test_all_threads_are_taken_if_nothing_is_said(halves):
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(halves.environment["threads"]) == count
    assert torch.get_num_threads() == 1  # this process stays as it was
