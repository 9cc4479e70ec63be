"""Text from files, folders, a hub data set, or the packaged sample."""

import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from slimrank.errors import TextError
from slimrank.recipe import CalibrationRecipe

SUFFIXES = (".txt", ".md", ".jsonl")
HUB_ROWS = 20_000


def packaged_text(part: Literal["calibration", "evaluation"]) -> str:
    """English text that ships with slimrank; the two parts share no work.

    The part to calibrate on is mixed: Wikipedia prose, Python source code, and technical text with
    maths and tables, in pieces that take turns. The part to evaluate on is Wikipedia prose.

    Examples
    --------
    >>> packaged_text("calibration") != packaged_text("evaluation")
    True
    """
    return files("slimrank.data").joinpath(f"{part}.txt").read_text(encoding="utf-8")


def read_text(calibration: CalibrationRecipe) -> str:
    """All the text that a recipe names, joined by blank lines.

    Raises
    ------
    TextError
        If a file is missing, cannot be read or is empty, or a data set cannot be had.
    """
    if not calibration.source:
        return packaged_text("calibration")
    parts: list[str] = []
    for source in calibration.source:
        path = Path(source)
        if path.exists():
            parts += _read_path(path, calibration.text_column)
        elif path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."):
            raise TextError(f"no such text file: {source}")
        else:
            parts += _read_hub(source, calibration)
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise TextError(f"the text is empty: {', '.join(calibration.source)}")
    return text


def _read_path(path: Path, column: str) -> list[str]:
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not inside:
            raise TextError(f"no {', '.join(SUFFIXES)} file in {path}")
        return [text for p in inside for text in _read_path(p, column)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read the text {path}: {error}") from error
    return list(_rows(text, path, column)) if path.suffix == ".jsonl" else [text]


def _rows(text: str, path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _text_of(json.loads(line), column)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TextError(f"{path}, line {number}: no text under '{column}' ({error})") from error


def _text_of(row: Any, column: str) -> str:
    """Text of a row. What is no text would otherwise be calibrated on as the word it prints as."""
    value = row[column]
    if not isinstance(value, str):
        raise TypeError(f"it holds {type(value).__name__}")
    return value


def _read_hub(name: str, calibration: CalibrationRecipe) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(
            f"no such text file: {name}; to read it as a hub data set, pip install slimrank[hub]"
        ) from error
    try:
        rows = load_dataset(
            name, calibration.subset, split=calibration.split, streaming=True
        ).shuffle(seed=calibration.seed, buffer_size=1000)
        return [_text_of(row, calibration.text_column) for row in islice(rows, HUB_ROWS)]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise TextError(f"neither a text file nor a hub data set: {name} ({line})") from error
