"""Compressed folders that a healing can gain much on, and text for it."""

import pytest

from slimrank import HealRecipe, compress, heal

KEEP = 0.5


@pytest.fixture(scope="session")
def text(make_windows):
    """Twelve windows to train on, four to stop by."""
    return make_windows(16, 20)


@pytest.fixture(scope="session")
def make_small(tmp_path_factory, make_folder, make_recipe, make_windows):
    """`make_small(family, dtype=..., **recipe)`: a folder that was compressed without any text."""

    def make(family="llama", overrides=None, **recipe):
        out = tmp_path_factory.mktemp("small") / family
        values = {"method": "svd", "keep": KEEP, **recipe}
        dense = make_folder(family, **(overrides or {}))
        compress(dense, make_recipe(**values), out=out, windows=make_windows())
        return out

    return make


@pytest.fixture(scope="session")
def small(make_small):
    """Such a Llama; not to be changed."""
    return make_small()


@pytest.fixture(scope="session")
def make_settings():
    """`make_settings(**others)`: settings of a short run."""

    def make(**others):
        values = {"learning_rate": 2e-3, "batch_sequences": 4, "held_out_sequences": 4}
        return HealRecipe(**{**values, **others})

    return make


@pytest.fixture
def run(small, text, make_settings, tmp_path):
    """`run(out="out", **heal)` heals that Llama; `settings` are those that differ."""

    def start(folder=small, out="out", settings=None, **others):
        recipe = make_settings(**(settings or {}))
        return heal(folder, tmp_path / out, recipe, **{"windows": text, **others})

    return start


@pytest.fixture
def measured(monkeypatch):
    """`measured(*divergences)`: what the next looks at the held-out sequences give."""

    def give(*divergences):
        left = iter(divergences)
        monkeypatch.setattr(
            "slimrank.healing.distillation.HeldOut.measure", lambda _self: (next(left), 9.0)
        )

    return give
