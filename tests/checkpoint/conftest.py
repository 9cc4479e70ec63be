"""A compressed folder to damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied(tmp_path: Path, compressed_folder: Path) -> Path:
    """A copy of the compressed Llama."""
    return Path(shutil.copytree(compressed_folder, tmp_path / "copy"))
