"""Measure a benchmark cell by cell; what is finished is never measured again."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

from slimrank.environment import environment
from slimrank.errors import SlimrankError
from slimrank.evaluation import require_harness, windows_perplexity, zero_shot
from slimrank.frontier.bench import BenchRecipe
from slimrank.frontier.cells import Cell, cells
from slimrank.frontier.dense import DenseModel, Fingerprints, Questions
from slimrank.frontier.int8 import require_int8
from slimrank.frontier.making import Made, in_int8, make
from slimrank.frontier.result import FrontierReport, FrontierRun, with_front
from slimrank.frontier.rows import failed_row, row, settings
from slimrank.frontier.store import REPORT, Measured, ResultStore
from slimrank.options import CompressionOptions

FAILURES = (SlimrankError, RuntimeError, ArithmeticError, MemoryError)
Say = Callable[[str], None]


def measure_frontier(
    bench: BenchRecipe,
    out: str | Path,
    *,
    options: CompressionOptions | None = None,
    say: Say = lambda _line: None,
) -> FrontierReport:
    """Make and measure every cell of a benchmark, under one accounting.

    The report is written anew after each cell. A cell that fails is a row with its error, and is
    tried again by the next call; one that is finished is read from its file.

    Parameters
    ----------
    bench : BenchRecipe
    out : str or Path
        Folder of results: new, empty, or of an earlier call.
    options : CompressionOptions, optional
        How to run.
    say : callable
        Is told, in one line, of each cell that begins or fails.

    Returns
    -------
    FrontierReport
        As in ``frontier.json``.

    Raises
    ------
    SlimrankError
        If the model, a text or the questions cannot be read, a package is missing that they need,
        no recipe is valid, or the folder cannot be written.
    """
    wanted = cells(bench)
    if any(cell.kind == "int8" for cell in wanted):
        require_int8()
    if bench.zero_shot is not None:
        require_harness()
    with ResultStore.open(Path(out)) as store:
        return _Bench.open(bench, wanted, store, options or CompressionOptions(), say).measure()


@dataclass(slots=True)
class _Bench:
    """A benchmark under way; holds the dense model in one dtype at a time."""

    bench: BenchRecipe
    cells: list[Cell]
    store: ResultStore
    options: CompressionOptions
    say: Say
    dense: DenseModel
    dtype: str
    fingerprints: Fingerprints
    environment: dict[str, str]
    done: dict[str, FrontierRun] = field(default_factory=dict)
    held: tuple[Cell, Made] | None = None

    @classmethod
    def open(
        cls,
        bench: BenchRecipe,
        wanted: list[Cell],
        store: ResultStore,
        options: CompressionOptions,
        say: Say,
    ) -> "_Bench":
        dtype = str(bench.base.get("dtype", "auto"))
        dense = DenseModel.open(bench, dtype, options.device)
        found = Fingerprints(Questions.open(bench, dense.tokenizer))
        where = environment(dense.model)
        return cls(bench, wanted, store, options, say, dense, dtype, found, where)

    def measure(self) -> FrontierReport:
        """Read what is finished, then measure what is not; write the report after each cell."""
        missing: dict[str, str] = {}
        for cell in self.cells:
            try:
                key = self._key(cell)
            except FAILURES as error:
                self._fail(cell, error)
                continue
            found = self.store.read(key)
            if found is None:
                missing[cell.name] = key
            else:
                self.done[cell.name] = row(cell, found, self.bench)
        report = self._write()
        left = [cell for cell in self.cells if cell.name in missing]
        for cell, after in zip_longest(left, left[1:]):
            self.say(f"{cell.name} ({len(self.done) + 1} of {len(self.cells)})")
            self._finish(cell, missing[cell.name], after)
            report = self._write()
        return report

    def _finish(self, cell: Cell, key: str, after: Cell | None) -> None:
        """Measure a cell and keep the result, unless it fails, or its twin just did it."""
        measured = self.store.read(key)
        if measured is None:
            try:
                measured = self._measure(cell, after)
            except FAILURES as error:
                self._fail(cell, error)
                return
            finally:
                gc.collect()
            self.store.keep(key, measured)
        self.done[cell.name] = row(cell, measured, self.bench)

    def _measure(self, cell: Cell, after: Cell | None) -> Measured:
        dense, questions = self._dense(cell), self.fingerprints.questions
        made = self._make(cell, dense)
        perplexity = {
            name: windows_perplexity(made.model, windows)
            for name, windows in questions.texts.items()
        }
        accuracy = {}
        if (asked := self.bench.zero_shot) is not None:
            accuracy = zero_shot(made.model, dense.tokenizer, questions.tasks, asked.batch_size)
        self.held = (cell, made) if after and after.is_int8_of(cell) else None
        return Measured(
            bytes=made.bytes,
            linear_bytes=made.linear_bytes,
            params=made.params,
            target_params=made.target_params,
            perplexity=perplexity,
            accuracy=accuracy,
            seconds=sum(made.phases.values()),
            phases=made.phases,
            peak_bytes=made.peak_bytes,
            environment=environment(dense.model),
            warnings=made.warnings,
        )

    def _make(self, cell: Cell, dense: DenseModel) -> Made:
        """Make a cell's model, or round the one that was measured just before, if it is that."""
        held, self.held = self.held, None
        if held is not None and cell.is_int8_of(held[0]):
            return in_int8(held[1])
        return make(cell, dense, self.store, self.fingerprints, self.options)

    def _key(self, cell: Cell) -> str:
        if cell.error is not None:
            raise cell.error
        return self.fingerprints.of_cell(cell, self._dense(cell))

    def _dense(self, cell: Cell) -> DenseModel:
        """The dense model in a cell's dtype."""
        dtype = str(cell.values.get("dtype", self.bench.base.get("dtype", "auto")))
        if dtype != self.dtype:
            self.dense = DenseModel.open(self.bench, dtype, self.options.device)
            self.dtype = dtype
        return self.dense

    def _fail(self, cell: Cell, error: BaseException) -> None:
        line = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, SlimrankError):
            line = f"{type(error).__name__}: {line}"
        self.say(f"{cell.name}: failed: {line}")
        self.done[cell.name] = failed_row(cell, line)

    def _write(self) -> FrontierReport:
        """Write the report of what there is so far, in the order of the benchmark."""
        text = next(iter(self.bench.texts))
        runs = [self.done[cell.name] for cell in self.cells if cell.name in self.done]
        report = FrontierReport(
            model=self.dense.name,
            environment=self.environment,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=settings(self.bench, self.fingerprints.questions.texts),
            runs=with_front(runs, text),
        )
        self.store.write(REPORT, report.to_json().encode())
        return report
