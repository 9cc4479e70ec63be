"""Results on disk: one file a cell, there whole or not at all, so that a run can go on."""

import shutil
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from slimrank.checkpoint import Profile, read_profile
from slimrank.checkpoint.durable import (
    LOCK,
    Frozen,
    locked,
    read_sealed,
    remove_passing,
    sealed,
    write_durably,
)
from slimrank.errors import CheckpointError, SlimrankWarning
from slimrank.evaluation import ChoiceResult, EvalResult

RUNS, PROFILES, REPORT = "runs", "profiles", "frontier.json"
FORMAT: Literal[1] = 1


class Measured(Frozen):
    """What is kept of a cell: all of its row but its name, and where each figure comes from."""

    bytes: int
    linear_bytes: int
    params: int
    target_params: int
    perplexity: dict[str, EvalResult]
    accuracy: dict[str, ChoiceResult]
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    environment: dict[str, str]
    warnings: tuple[str, ...]


class RunRecord(Frozen):
    """A file of `runs`."""

    format_version: Literal[1] = FORMAT
    fingerprint: str
    measured: Measured


@final
@dataclass(slots=True, eq=False)
class ResultStore:
    """The folder of a benchmark, open to one process at a time."""

    folder: Path
    _lock: ExitStack

    @classmethod
    def open(cls, folder: Path) -> "ResultStore":
        """Make the folder, or go on with the one that is there.

        Raises
        ------
        CheckpointError
            If it holds other files than a benchmark's, another process works on it, or the disk
            refuses.
        """
        try:
            if folder.is_dir() and not (folder / RUNS).is_dir():
                others = [path.name for path in folder.iterdir() if path.name != LOCK]
                if others:
                    raise CheckpointError(
                        f"{folder} holds {others[0]} and no {RUNS}; name an empty folder, or one "
                        "of a benchmark to go on with"
                    )
            for name in (RUNS, PROFILES):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error
        with locked(folder, folder) as lock:  # what a killed process left is then nobody's
            remove_passing(folder)
            remove_passing(folder / RUNS)
            for path in (folder / PROFILES).glob(".*.partial-*"):
                shutil.rmtree(path)
            return cls(folder, lock.pop_all())

    def read(self, fingerprint: str) -> Measured | None:
        """What was measured of a cell; None if it is yet to be.

        Warns
        -----
        SlimrankWarning
            If the file is damaged or of another version: the cell is then to be measured anew.
        """
        path = self.folder / RUNS / f"{fingerprint}.json"
        if not path.exists():
            return None
        try:
            record = read_sealed(path, RunRecord, "it is measured anew")
            if record.fingerprint != fingerprint:
                raise CheckpointError(f"{path} is of another cell; it is measured anew")
        except CheckpointError as error:
            warnings.warn(str(error), SlimrankWarning, stacklevel=2)
            return None
        return record.measured

    def keep(self, fingerprint: str, measured: Measured) -> None:
        """Write a cell down.

        Raises
        ------
        CheckpointError
            If the disk is full or refuses.
        """
        record = RunRecord(fingerprint=fingerprint, measured=measured)
        write_durably(self.folder / RUNS, f"{fingerprint}.json", sealed(record))

    def write(self, name: str, content: bytes) -> None:
        """Write the report or its picture."""
        write_durably(self.folder, name, content)

    def profile_folder(self, fingerprint: str) -> Path:
        """Where a profile is kept, or is to be."""
        return self.folder / PROFILES / fingerprint

    def read_profile(self, fingerprint: str) -> Profile | None:
        """Open a profile; None if it is yet to be made. A damaged one is removed with a warning."""
        folder = self.profile_folder(fingerprint)
        if not folder.exists():
            return None
        try:
            return read_profile(folder)
        except CheckpointError as error:
            warnings.warn(f"{error}; it is made anew", SlimrankWarning, stacklevel=2)
            shutil.rmtree(folder)
            return None

    def close(self) -> None:
        """Let other processes at the folder."""
        self._lock.close()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
