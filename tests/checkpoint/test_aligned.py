"""Tensors begin on cache lines, in files that read back to the bit and have the predicted size."""

import json
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slimrank
from slimrank import CompressionOptions
from slimrank.checkpoint import align_folder, read_headers, renamed_when_done, safetensors_bytes
from slimrank.checkpoint.aligned import align_file, padding
from slimrank.errors import CheckpointError, SlimrankWarning
from slimrank.exporting import export_dense
from slimrank.nn import LowRankLinear
from tiny.faults import full_disk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int8, torch.bool]


def header_of(file):
    """The header, checked to be one, and where the data begin."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start].decode()), start


def begins(file):
    """Where in a file each tensor begins, and its bytes."""
    entries, start = header_of(file)
    offsets = {n: entry["data_offsets"] for n, entry in entries.items() if n != "__metadata__"}
    return {name: (start + begin, end - begin) for name, (begin, end) in offsets.items()}


def on_lines(places, moved=0):
    """Bytes of those tensors that begin on a cache line."""
    return sum(size for begin, size in places.values() if (begin + moved) % 64 == 0)


def written(tensors, file):
    save_file(tensors, file, {"format": "pt"})
    return file


@pytest.mark.parametrize(
    ("start", "sizes", "expected"),
    [
        (104, [], 0),
        (104, [0, 0], 0),
        (64, [10**6], 0),
        (72, [10**6], 56),
        (120, [10**6], 8),
        (104, [128, 64, 64], 24),
        (104, [128, 8, 256], 16),  # the last is larger than what is before the odd one
        (104, [128, 8, 136], 16),  # as many bytes: the smaller
        (104, [4, 1000], 24),  # 4 bytes behind a multiple of 8, nothing helps
        (104, [4, 60, 1000], 24),
        (104, [0, 8, 1000], 16),  # an empty one counts for nothing
    ],
)
def test_by_hand(start, sizes, expected):
    assert padding(start, sizes) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    drawn=st.dictionaries(
        st.text('abcü"\\. ', min_size=1, max_size=30),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)),
        max_size=8,
    ),
    chunk=st.integers(1, 500),
)
def test_any_file(tmp_path, drawn, chunk):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-99, 99, shape, generator=draw).to(dtype)
        for name, (dtype, shape) in drawn.items()
    }
    file = written(tensors, tmp_path / "x.safetensors")
    before, as_written = begins(file), file.stat().st_size
    align_file(file, chunk)
    read = load_file(file)
    assert read.keys() == tensors.keys() == read_headers([file]).keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert safetensors_bytes(tensors) == as_written
    assert safetensors_bytes(tensors, aligned=True) == file.stat().st_size
    best = max(on_lines(before, moved) for moved in range(0, 64, 8))
    moved = file.stat().st_size - as_written
    assert moved == min(m for m in range(0, 64, 8) if on_lines(before, m) == best)
    assert on_lines(begins(file)) == best


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 4096])
def test_data_are_moved_in_chunks(tmp_path, chunk):
    tensors = {"a": torch.arange(1000, dtype=torch.int32), "other": torch.arange(32.0)}
    file = written(tensors, tmp_path / "x.safetensors")
    start = header_of(file)[1]
    data = file.read_bytes()[start:]
    assert start % 64
    align_file(file, chunk)
    aligned, now = file.read_bytes(), header_of(file)[1]
    assert now % 64 == 0
    assert aligned[start:now] == b" " * (now - start)
    assert aligned[now:] == data


def test_an_aligned_file_is_left_untouched(tmp_path):
    file = written({"a": torch.ones(64, 64)}, tmp_path / "x.safetensors")
    align_folder(tmp_path)
    aligned = file.read_bytes()
    os.utime(file, (0, 0))
    align_folder(tmp_path)
    assert file.read_bytes() == aligned
    assert file.stat().st_mtime == 0


@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(0)}, {"a": torch.zeros(3, 0, 2)}])
def test_without_data_there_is_nothing_to_move(tmp_path, tensors):
    file = written(tensors, tmp_path / "x.safetensors")
    before = file.read_bytes()
    align_folder(tmp_path)
    assert file.read_bytes() == before


@pytest.fixture
def wide_folder(make_folder):
    """A dense model with sides that are multiples of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    return make_folder("llama", dtype=torch.bfloat16, num_key_value_heads=4, **sizes)


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_compressed_folder(layout, stream, wide_folder, make_recipe, tmp_path):
    budget = {"param_ratio": 0.8, "multiple_of": 32}
    out, options = tmp_path / "out", CompressionOptions(stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimrankWarning)
        recipe = make_recipe(layout=layout, budget=budget, dtype="bfloat16")
        slimrank.compress(wide_folder, recipe, out=out, options=options)
    places = begins(out / "model.safetensors")
    assert all(begin % 64 == 0 for begin, size in places.values() if size)
    model = AutoModelForCausalLM.from_pretrained(out)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert {layer.pivoted for layer in layers} == {layout == "pivoted"}
    assert all(p.data_ptr() % 64 == 0 for layer in layers for p in layer.parameters())


def test_quantized_and_dense_folders(compressed_folder, tmp_path):
    slimrank.quantize(compressed_folder, tmp_path / "codes")
    file = tmp_path / "codes" / "model.safetensors"
    assert file.stat().st_size == safetensors_bytes(load_file(file), aligned=True)
    export_dense(compressed_folder, tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    assert file.stat().st_size == safetensors_bytes(load_file(file))


def test_a_disk_that_is_full(tmp_path):
    def write(out):
        with renamed_when_done(out) as folder:
            written({"a": torch.ones(9)}, folder / "x.safetensors")
            steps = len(done)
            align_folder(folder)
        return steps

    with full_disk(tmp_path, None) as done:
        steps = write(tmp_path / "whole")
    assert done[steps] == "io.open"
    with (
        full_disk(tmp_path, steps) as done,
        pytest.raises(CheckpointError, match=r"cannot write .*out: .*No space left"),
    ):
        write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
