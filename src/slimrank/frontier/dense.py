"""The dense model of a benchmark, and what all of its cells are held against."""

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slimrank.calibration import TokenWindows, read_text
from slimrank.drawing import draw
from slimrank.environment import environment
from slimrank.errors import SlimrankWarning, TextError
from slimrank.evaluation import ChoiceTask, cut_windows, read_choice_tasks
from slimrank.frontier.bench import BenchRecipe
from slimrank.frontier.cells import Cell
from slimrank.frontier.store import FORMAT
from slimrank.model import weights_fingerprint
from slimrank.recipe import CalibrationRecipe, CompressionRecipe
from slimrank.source import open_dense, tokenize
from slimrank.targets import find_work

OF_TARGETS = ("targets", "ignore", "blocks")


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A dense model in one dtype; never changed.

    Parameters
    ----------
    model : PreTrainedModel
    name : str
    tokenizer : PreTrainedTokenizerBase
    fingerprint : str
        Of its weights.
    targets : tuple of str
        The linears that the benchmark's base targets.
    """

    model: Any
    name: str
    tokenizer: Any
    fingerprint: str
    targets: tuple[str, ...]

    @classmethod
    def open(cls, bench: BenchRecipe, dtype: str, device: str | None) -> "DenseModel":
        """Load it.

        Raises
        ------
        SlimrankError
            See `slimrank.source.open_dense` and `slimrank.targets.find_work`.
        """
        model, name, tokenizer = open_dense(bench.model, dtype, device=device)
        chosen = {key: bench.base[key] for key in OF_TARGETS if key in bench.base}
        whole = CompressionRecipe.from_dict({**chosen, "budget": {"param_ratio": 1}}, "base")
        targets = tuple(find_work(model, whole).names)
        return cls(model, name, tokenizer, weights_fingerprint(model), targets)


@dataclass(frozen=True, slots=True)
class Questions:
    """What every model is asked: texts in its tokens, and questions with several answers."""

    texts: dict[str, TokenWindows]
    tasks: tuple[ChoiceTask, ...]

    @classmethod
    def open(cls, bench: BenchRecipe, tokenizer: Any) -> "Questions":
        """Read and tokenize the texts of a benchmark, and read its questions.

        Raises
        ------
        TextError
            If one is missing, or shorter than the windows asked for.
        """
        asked = bench.zero_shot
        tasks = read_choice_tasks(asked.folder, asked.tasks, asked.limit) if asked else []
        texts: dict[str, TokenWindows] = {}
        for name, source in bench.texts.items():
            if not Path(source.path).exists():
                raise TextError(f"text '{name}': no such file: {source.path}")
            ids = tokenize(tokenizer, read_text(CalibrationRecipe(source=(source.path,))))
            try:
                texts[name] = cut_windows(ids, bench.windows.length, bench.windows.number)
            except TextError as error:
                raise TextError(f"text '{name}': {error}") from error
        return cls(texts, tuple(tasks))

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """SHA-256 of each text's windows and of each task's questions."""
        return {
            "texts": {name: windows.fingerprint() for name, windows in self.texts.items()},
            "tasks": {task.name: task.fingerprint() for task in self.tasks},
        }


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Keys of results: all that decides a figure, and nothing that does not."""

    questions: Questions
    _drawn: dict[str, str] = field(default_factory=dict)

    def of_cell(self, cell: Cell, dense: DenseModel) -> str:
        """Key of a cell's result.

        Raises
        ------
        TextError
            If the calibration text is missing or too short (see `of_calibration`).
        """
        recipe = cell.recipe
        values: dict[str, Any] = {
            "format": FORMAT,
            "slimrank": version("slimrank"),
            "model": dense.fingerprint,
            "dtype": environment(dense.model)["dtype"],
            "kind": cell.kind,
            **self.questions.fingerprints(),
        }
        if recipe is None:
            values["targets"] = dense.targets
        else:
            values["recipe"] = recipe.model_dump(mode="json")
            values["calibration"] = self.of_calibration(recipe.calibration, dense)
        if cell.int8_factors:
            values["factors"] = "int8"
        return _digest(values)

    def of_profile(self, recipe: CompressionRecipe, dense: DenseModel) -> str:
        """Key of a profile.

        Raises
        ------
        TextError
            See `of_calibration`.
        """
        values = {
            "slimrank": version("slimrank"),
            "model": dense.fingerprint,
            "recipe": recipe.model_dump(mode="json"),
            "calibration": self.of_calibration(recipe.calibration, dense),
        }
        return _digest(values)

    def of_calibration(self, calibration: CalibrationRecipe, dense: DenseModel) -> str:
        """SHA-256 of the token ids that a calibration draws, those held out among them.

        Raises
        ------
        TextError
            If the text is missing, or holds fewer sequences than asked for: methods that hold some
            out would then calibrate on fewer tokens than the others.
        """
        key = calibration.model_dump_json()
        if key not in self._drawn:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SlimrankWarning)  # that the text is too short
                windows = draw(calibration, dense.tokenizer, with_held_out=True)
            wanted = calibration.num_sequences + calibration.held_out_sequences
            if len(windows.windows) < wanted:
                raise TextError(
                    f"the calibration text holds {len(windows.windows)} sequences of "
                    f"{calibration.sequence_length} tokens, and {wanted} are needed, those held "
                    "out counted in, for all methods to see the same; ask for fewer"
                )
            self._drawn[key] = windows.fingerprint()
        return self._drawn[key]


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
