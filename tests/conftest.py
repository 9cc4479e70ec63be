"""Fixtures of all tests: tiny models, tokens for them, folders that hold them. No network."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="slimrank-tests-")  # code of folders

import atexit
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import slimrank
from slimrank import CompressionRecipe, CompressionReport, TokenWindows, compress
from slimrank.calibration import packaged_text
from slimrank.checkpoint import Profile
from tiny import models as TINY

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # matrices this small run no faster on more


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start, also from a run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a `family`, and names none itself, on all of them."""
    named = any("family" in m.args[0] for m in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not named:
        metafunc.parametrize("family", TINY.FAMILIES)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module of tiny models, for its constants."""
    return TINY


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(family, seed=0, dtype=torch.float32, **overrides)` gives a fresh model."""
    return TINY.build


@pytest.fixture(scope="session")
def make_skeleton() -> Callable[..., Any]:
    """`make_skeleton(family, **overrides)` gives a model on the meta device."""
    return TINY.build_skeleton


@pytest.fixture(scope="session")
def make_experts_model() -> Callable[..., Any]:
    """`make_experts_model(experts=4, top=2, closed=())` gives a Llama with experts in a list."""
    return TINY.build_listed_experts


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token a character."""
    return TINY.build_tokenizer()


@pytest.fixture(scope="session")
def make_windows() -> Callable[..., TokenWindows]:
    """`make_windows(count, length, seed=0)` gives windows of random tokens."""

    def make(count: int = 8, length: int = 24, seed: int = 0) -> TokenWindows:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, TINY.VOCABULARY, (count, length), generator=generator)
        return TokenWindows(tuple(ids))

    return make


@pytest.fixture(scope="session")
def windows(make_windows: Callable[..., TokenWindows]) -> TokenWindows:
    """Eight windows of 24 tokens, longer than the window of sliding attention."""
    return make_windows()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first thousands of characters of the packaged text."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(packaged_text("calibration")[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_recipe(text_file: Path) -> Callable[..., CompressionRecipe]:
    """`make_recipe(keep=0.5, method=..., **others)`: plain layout, short sequences of a text."""

    def make(keep: float = 0.5, scope: str = "targets", **others: Any) -> CompressionRecipe:
        calibration = {"source": [str(text_file)], "num_sequences": 8, "sequence_length": 32}
        values = {
            "effort": "fast",
            "layout": "plain",
            "budget": {"param_ratio": keep, "scope": scope},
            "calibration": calibration,
            **others,
        }
        return CompressionRecipe.from_dict(values)

    return make


@pytest.fixture(scope="session")
def count_params() -> Callable[[Any], int]:
    """Parameters of a model as reports count them: a pivot is two."""

    def count(model: Any) -> int:
        pivots = sum(t.numel() for name, t in model.named_buffers() if name.endswith(".pivots"))
        return sum(p.numel() for p in model.parameters()) + 2 * pivots

    return count


@pytest.fixture(scope="session")
def make_compressed(
    make_model: Callable[..., Any],
    make_recipe: Callable[..., CompressionRecipe],
    windows: TokenWindows,
) -> Callable[..., tuple[Any, CompressionReport]]:
    """`make_compressed(family, keep=0.5, dtype=..., **recipe)` gives a model and its report."""

    def make(
        family: str, dtype: torch.dtype = torch.float32, **recipe: Any
    ) -> tuple[Any, CompressionReport]:
        model = make_model(family, dtype=dtype)
        return model, compress(model, make_recipe(**recipe), windows=windows)

    return make


@pytest.fixture(scope="session")
def make_folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[..., Path]:
    """`make_folder(family, **as make_model)` writes a dense folder with its tokenizer."""

    def make(family: str = "llama", **overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp("dense") / family
        make_model(family, **overrides).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def dense_folder(make_folder: Callable[..., Path]) -> Path:
    """A dense Llama on disk; not to be changed."""
    return make_folder("llama")


@pytest.fixture(scope="session")
def compressed_folder(
    tmp_path_factory: pytest.TempPathFactory,
    dense_folder: Path,
    make_recipe: Callable[..., CompressionRecipe],
) -> Path:
    """The same, compressed to a half; not to be changed."""
    out = tmp_path_factory.mktemp("compressed") / "llama"
    slimrank.compress(dense_folder, make_recipe(layout="auto"), out=out)
    return out


@pytest.fixture(scope="session")
def calibration_part(windows: TokenWindows) -> TokenWindows:
    """What a profile on `windows` calibrates on: a half of them, since so few are there."""
    return TokenWindows(windows.windows[:4])


@pytest.fixture(scope="session")
def make_profile(
    tmp_path_factory: pytest.TempPathFactory,
    make_recipe: Callable[..., CompressionRecipe],
    windows: TokenWindows,
) -> Callable[..., Profile]:
    """`make_profile(model, recipe=None, **as slimrank.profile)` gives a profile on `windows`."""

    def make(model: Any, recipe: CompressionRecipe | None = None, **options: Any) -> Profile:
        out = tmp_path_factory.mktemp("profile") / "profile"
        return slimrank.profile(
            model, recipe or make_recipe(), out, **{"windows": windows, **options}
        )

    return make


@pytest.fixture
def probe(windows: TokenWindows) -> torch.Tensor:
    """Two windows as a batch."""
    return torch.stack(windows.windows[:2])
