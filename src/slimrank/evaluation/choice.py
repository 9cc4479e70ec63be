"""Questions with several answers, from local files: which of them a model finds likeliest."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimrank.errors import TextError

FORMS = {
    "choices": ("context", "choices", "gold"),
    "contexts": ("contexts", "continuation", "gold"),
}


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """Questions of one form.

    Parameters
    ----------
    name : str
    rows : tuple of dict
        Each with ``context, choices, gold``: which choice goes on from the context; or each with
        ``contexts, continuation, gold``: which context has this continuation, as in WinoGrande.
    """

    name: str
    rows: tuple[dict[str, Any], ...]

    @property
    def is_partial(self) -> bool:
        """True if only what follows the answers is scored, the answers being in the contexts."""
        return "contexts" in self.rows[0]

    def pairs(self) -> list[list[tuple[str, str]]]:
        """What is conditioned on and what is scored, for each answer of each question."""
        if self.is_partial:
            return [[(c, row["continuation"]) for c in row["contexts"]] for row in self.rows]
        return [[(row["context"], c) for c in row["choices"]] for row in self.rows]

    def fingerprint(self) -> str:
        """SHA-256 of the questions."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()


def read_choice_tasks(
    folder: str | Path, names: Sequence[str], limit: int | None = None
) -> list[ChoiceTask]:
    """Read ``<folder>/<name>.jsonl`` for each name, one question a line.

    Parameters
    ----------
    folder : str or Path
    names : sequence of str
    limit : int, optional
        Take only the first questions of each, at least 2.

    Raises
    ------
    TextError
        If a name is none of a file, or there twice; a file is missing, a line is no question, or
        fewer than 2 are left (there is no standard error of one).
    """
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
            raise TextError(f"'{name}' is no name of a task, or is named twice")
    return [_read(Path(folder) / f"{name}.jsonl", name, limit) for name in names]


def find_choice_tasks(folder: str | Path) -> list[str]:
    """Names of all tasks in a folder, sorted.

    Raises
    ------
    TextError
        If there is none.
    """
    names = sorted(path.stem for path in Path(folder).glob("*.jsonl"))
    if not names:
        raise TextError(f"no file of questions, <task>.jsonl, in {folder}")
    return names


def _read(path: Path, name: str, limit: int | None) -> ChoiceTask:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none"
        raise TextError(f"no such task: {path}; there are {there}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read the task {path}: {error}") from error
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()][:limit]
    rows = tuple(_question(line, f"{path}, line {n}") for n, line in numbered)
    if len(rows) < 2:
        raise TextError(f"{path}: {len(rows)} questions; an accuracy needs at least 2")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise TextError(f"{path} mixes questions of both forms; put them into two files")
    return ChoiceTask(name, rows)


def _question(line: str, where: str) -> dict[str, Any]:
    """One question, with the keys of its form only, once it is seen to be whole."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{where}: not JSON: {error}") from error
    form = next((f for f in FORMS.values() if isinstance(row, dict) and row.keys() >= set(f)), None)
    if form is None:
        forms = " or ".join("{" + ", ".join(form) + "}" for form in FORMS.values())
        raise TextError(f"{where}: a question is {forms}")
    row = {key: row[key] for key in form}
    several, one = ("contexts", "continuation") if "contexts" in row else ("choices", "context")
    answers, gold = row[several], row["gold"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise TextError(f"{where}: {several} is to be a list of at least 2 texts")
    if not all(isinstance(text, str) for text in (*answers, row[one])):
        raise TextError(f"{where}: {several} and {one} are to be text")
    scored = answers if several == "choices" else [row[one]]
    if not all(text.strip() for text in scored):
        raise TextError(f"{where}: an empty text cannot be scored")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(answers):
        raise TextError(
            f"{where}: gold is {gold!r}; it numbers one of {len(answers)} answers, from 0"
        )
    return row
