"""What to measure: a frozen, checked reading of ``bench.yaml``."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from slimrank.errors import RecipeError
from slimrank.recipe import first_fault, read_recipe_text, yaml_mapping


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSource(_Frozen):
    """A text to measure perplexity on.

    Parameters
    ----------
    path : str
    in_domain : bool
        Whether it is of the kind of the calibration text; its figures are marked as such.
    """

    path: str
    in_domain: bool = False


class WindowsSettings(_Frozen):
    """How texts are cut: windows of so many tokens, the first ones or all of the text."""

    length: int = Field(default=1024, ge=2)
    number: int | None = Field(default=None, ge=1)


class ZeroShotSettings(_Frozen):
    """Local files of questions, ``<folder>/<task>.jsonl`` (see `slimrank.evaluation.choice`).

    Parameters
    ----------
    folder : str
    tasks : tuple of str
    limit : int or None
        Take only the first questions of each.
    batch_size : int
        Answers at once; changes no figure beyond rounding.
    """

    folder: str
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=2)
    batch_size: int = Field(default=16, ge=1)

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name) or names.count(name) > 1:
                raise ValueError(f"'{name}' is no name of a file, or is named twice")
        return names


class NamedRun(_Frozen):
    """A run of its own: `recipe` is laid over the base, key by key."""

    name: str = Field(min_length=1)
    recipe: dict[str, Any] = {}


class BenchRecipe(_Frozen):
    """A model, texts, and the recipes to hold against each other on them.

    Parameters
    ----------
    model : str
        A folder, a hub id or a ``.gguf`` file.
    texts : dict of str to TextSource
        The Pareto front is drawn by the first one.
    windows : WindowsSettings
    base : dict
        Recipe keys that all runs share, without the share to keep.
    keep : tuple of float
        Shares to keep; every recipe is made at each, but for those that name their own.
    grid : dict of str to tuple, optional
        Values of recipe keys (dotted ones too); every combination is made. Left out where there are
        `runs`, nothing but those is made; left out without, the base.
    runs : tuple of NamedRun
        Further recipes, one by one.
    dense, int8 : bool
        Whether to measure the dense model, and the dense model with int8 weights.
    int8_factors : bool
        Whether to measure each model of low rank a second time, with its factors in int8.
    zero_shot : ZeroShotSettings, optional
    seed : int
        Of the draw of calibration sequences, unless the recipe says it.

    Examples
    --------
    >>> bench = BenchRecipe.from_yaml("{model: m, texts: {wiki: {path: w.txt}}, keep: [0.8]}")
    >>> bench.windows.length, bench.texts["wiki"].in_domain
    (1024, False)
    """

    model: str
    texts: dict[str, TextSource] = Field(min_length=1)
    windows: WindowsSettings = WindowsSettings()
    base: dict[str, Any] = {}
    keep: tuple[float, ...] = ()
    grid: dict[str, tuple[Any, ...]] | None = None
    runs: tuple[NamedRun, ...] = ()
    dense: bool = True
    int8: bool = False
    int8_factors: bool = False
    zero_shot: ZeroShotSettings | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _makes_sense(self) -> "BenchRecipe":
        budget = self.base.get("budget") or {}
        if not isinstance(budget, dict):
            raise ValueError("base.budget: it is a mapping of keys to values")
        if "param_ratio" in budget:
            raise ValueError("base.budget.param_ratio: name the shares under `keep`")
        if len(set(self.keep)) < len(self.keep) or not all(0 < x <= 1 for x in self.keep):
            raise ValueError("keep: shares are in (0, 1], each named once")
        for key, values in (self.grid or {}).items():
            if not values:
                raise ValueError(f"grid.{key}: name at least one value")
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise ValueError("runs: two have the same name")
        return self

    @classmethod
    def from_yaml(cls, text: str, where: str = "bench") -> "BenchRecipe":
        """Read YAML, in which ``off`` and ``on`` are words (as in YAML 1.2).

        Raises
        ------
        RecipeError
            With the first thing that is wrong, in one line.
        """
        values = yaml_mapping(text, where, "a benchmark", _Loader)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first, key, message = first_fault(error)
            if first["type"] == "extra_forbidden":
                message = "unknown key"
                if len(first["loc"]) == 1:
                    message += f"; there are {', '.join(cls.model_fields)}"
            raise RecipeError(
                f"{where}: {key}: {message}" if key else f"{where}: {message}"
            ) from error

    @classmethod
    def from_file(cls, path: str | Path) -> "BenchRecipe":
        """Read a YAML file."""
        return cls.from_yaml(read_recipe_text(path), str(path))


class _Loader(yaml.SafeLoader):
    """Reads only ``true`` and ``false`` as truth values: ``refine: off`` names a preset."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
