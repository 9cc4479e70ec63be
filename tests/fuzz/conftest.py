"""Small valid folders to spoil."""

import shutil

import pytest
import torch

import slimrank
from slimrank.quantizing import quantize


@pytest.fixture(scope="session")
def valid(tmp_path_factory, dense_folder, make_folder, make_recipe, windows):
    """Folders by what they are: dense, pivoted, int8, latent (split, with a cache), packed."""
    root = tmp_path_factory.mktemp("valid")
    slimrank.compress(
        dense_folder, make_recipe(layout="auto"), out=root / "pivoted", windows=windows
    )
    quantize(root / "pivoted", root / "int8", dense_linears=True)
    fused = make_folder("phi3", dtype=torch.bfloat16)
    recipe = make_recipe(kv_cache={"keep": 0.5})
    slimrank.compress(fused, recipe, out=root / "latent", windows=windows)
    quantize(root / "latent", root / "packed", packing="remapped")
    shutil.copytree(dense_folder, root / "dense")
    return root


@pytest.fixture(scope="module")
def spoil(valid, tmp_path_factory):
    """`spoil(kind)` is a folder of its own to spoil, the same at each call."""
    root = tmp_path_factory.mktemp("spoiled")

    def copy(kind):
        folder = root / kind
        if not folder.exists():
            shutil.copytree(valid / kind, folder)
        return folder

    return copy
