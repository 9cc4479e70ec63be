"""A benchmark of a tiny model on a few thousand characters."""

import pytest

import slimrank
from slimrank import evaluation
from slimrank.calibration import packaged_text, read_text
from slimrank.frontier import BenchRecipe, making, run
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize


@pytest.fixture
def values(dense_folder, text_file, tmp_path):
    """Keys of a benchmark that takes a second or so."""
    (tmp_path / "near.txt").write_text(packaged_text("calibration")[8000:9000], encoding="utf-8")
    (tmp_path / "far.txt").write_text("0123 4567 89, " * 60, encoding="utf-8")
    return {
        "model": str(dense_folder),
        "texts": {
            "near": {"path": str(tmp_path / "near.txt"), "in_domain": True},
            "far": {"path": str(tmp_path / "far.txt")},
        },
        "windows": {"length": 64, "number": 4},
        "base": {
            "calibration": {
                "source": [str(text_file)],
                "num_sequences": 8,
                "sequence_length": 32,
                "held_out_sequences": 2,
            }
        },
        "keep": [0.8, 0.6],
    }


@pytest.fixture
def make_bench(values):
    """`make_bench(**overrides)` gives a benchmark."""

    def make(**overrides):
        return BenchRecipe.model_validate({**values, **overrides})

    return make


@pytest.fixture
def linear_bytes():
    """`linear_bytes(folder, report)`: of the compressed linears as loaded, without their biases."""

    def count(folder, report):
        linears = {linear.name for linear in report.linears}
        return sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in slimrank.load(folder).state_dict().items()
            if any(name.startswith(f"{x}.") for x in linears) and not name.endswith("bias")
        )

    return count


@pytest.fixture
def perplexity_alone():
    """`perplexity_alone(folder, path)`: of a folder on a text, in the windows of `values`."""

    def measure(folder, path):
        source = parse_source(folder)
        ids = tokenize(load_tokenizer(source), read_text(CalibrationRecipe(source=(path,))))
        return evaluation.perplexity(load_model(source), ids, 64, 4)

    return measure


@pytest.fixture
def calls(monkeypatch):
    """Names of the cells that were made, and how many profiles."""
    made, profiled = [], []
    make, profile = run.make, making.profile

    def count(cell, *rest):
        made.append(cell.name)
        return make(cell, *rest)

    def count_profile(*arguments, **named):
        profiled.append(1)
        return profile(*arguments, **named)

    monkeypatch.setattr(run, "make", count)
    monkeypatch.setattr(making, "profile", count_profile)
    return made, profiled
