"""Copies of a folder's files: the weights, and what stands beside them.

Beside them are tokenizer, chat template, generation settings.
"""

import shutil
from collections.abc import Container
from pathlib import Path

from slimrank.checkpoint.sound import own_file

WEIGHTS = (".safetensors", ".safetensors.index.json")


def copy_other_files(source: Path, folder: Path, left_out: Container[str] = ()) -> None:
    """Copy the files of a folder that are no weights, unless they are there already.

    Parameters
    ----------
    source : Path
    folder : Path
        Exists.
    left_out : container of str
        Names that are not copied.

    Raises
    ------
    CheckpointError
        If a file is a link that leads out of `source`.
    """
    for file in source.iterdir():
        is_left_out = file.name in left_out or file.name.endswith(WEIGHTS)
        if file.is_file() and not is_left_out and not (folder / file.name).exists():
            shutil.copyfile(own_file(source, file.name), folder / file.name)


def copy_weights(source: Path, folder: Path) -> None:
    """Copy the weight files of a folder, and their index.

    Parameters
    ----------
    source : Path
    folder : Path
        Exists.

    Raises
    ------
    CheckpointError
        If a file is a link that leads out of `source`.
    """
    for file in source.iterdir():
        if file.name.endswith(WEIGHTS):
            shutil.copyfile(own_file(source, file.name), folder / file.name)
