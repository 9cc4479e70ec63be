"""Predicted bytes are the bytes on disk."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slimrank import LowRankLinear
from slimrank.checkpoint import (
    align_folder,
    folder_bytes,
    read_headers,
    safetensors_bytes,
    weight_file_bytes,
)
from slimrank.errors import CheckpointError
from slimrank.linalg import Factors
from slimrank.model import replace_linear

pytestmark = pytest.mark.filterwarnings("ignore:.*fused tensors:slimrank.errors.CoverageWarning")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.zeros(3)},
        {"a": torch.zeros(0)},
        {"scalar": torch.tensor(1.0)},
        {f"name{i}": torch.zeros(i, 7) for i in range(30)},
        {"half": torch.zeros(3).half(), "b": torch.zeros(5, dtype=torch.int64), "c": torch.ones(2)},
        {"ü": torch.zeros(2), 'quo"te': torch.zeros(2), "back\\slash": torch.zeros(1)},
        {"flag": torch.zeros(3, dtype=torch.bool), "byte": torch.zeros(5, dtype=torch.uint8)},
    ],
)
def test_one_file(tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert safetensors_bytes(tensors) == path.stat().st_size


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F4", [16], 8), ("F99", [2], 8), ("F32", [-2], 8)],
)
def test_a_header_that_torch_has_no_tensor_for(tmp_path, dtype, shape, size):
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        read_headers([path])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_folder(family, make_model, tmp_path, dtype):
    model = make_model(family, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert folder_bytes(model) == weight_file_bytes(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_compressed_folder(family, make_compressed, tmp_path, dtype):
    model, report = make_compressed(family, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert folder_bytes(model) == weight_file_bytes(tmp_path)
    align_folder(tmp_path)
    assert folder_bytes(model, aligned=True) == weight_file_bytes(tmp_path)
    assert report.size.weight_bytes == weight_file_bytes(tmp_path)


def test_ranks_on_the_meta_device(family, make_model, make_skeleton, tmp_path):
    model = make_model(family)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".1." in n]
    ranks = {name: 2 + number for number, name in enumerate(names)}
    predicted = folder_bytes(make_skeleton(family), ranks)
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        factors = Factors(
            torch.zeros(linear.out_features, rank), torch.zeros(rank, linear.in_features)
        )
        replace_linear(model, name, LowRankLinear.from_factors(linear, factors))
    model.save_pretrained(tmp_path)
    assert predicted == weight_file_bytes(tmp_path)
