"""From a benchmark to its cells: each a model that is to be made and measured."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from slimrank.errors import RecipeError, SlimrankError
from slimrank.frontier.bench import BenchRecipe
from slimrank.recipe import CompressionRecipe

Kind = Literal["dense", "int8", "low-rank"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of the result.

    Parameters
    ----------
    name : str
    kind : {'dense', 'int8', 'low-rank'}
    values : dict
        The recipe as put together; empty for a baseline.
    recipe : CompressionRecipe or None
        None for a baseline, and where the values are no valid recipe.
    error : SlimrankError or None
        Why they are not.
    int8_factors : bool
        Whether the factors are rounded to int8 in the end.
    """

    name: str
    kind: Kind
    values: dict[str, Any]
    recipe: CompressionRecipe | None = None
    error: SlimrankError | None = None
    int8_factors: bool = False

    def is_int8_of(self, other: "Cell") -> bool:
        """Whether this is the other's model with its factors in int8."""
        return self.int8_factors and not other.int8_factors and self.recipe == other.recipe


def cells(bench: BenchRecipe) -> list[Cell]:
    """Baselines, then every combination of the grid at every size, then the runs of their own.

    A combination that is no valid recipe is a cell with an error: a grid may hold some. With
    `int8_factors`, each valid one is followed by a second cell.

    Raises
    ------
    RecipeError, BudgetError
        If a recipe has an unknown key, a run of its own is not valid, no combination is, nothing is
        to be made, or two cells have the same name.

    Examples
    --------
    >>> bench = BenchRecipe.from_yaml('''
    ... model: m
    ... texts: {wiki: {path: w.txt}}
    ... keep: [0.8, 0.6]
    ... grid: {method: [svd, swift-svd], refine: [off]}
    ... ''')
    >>> [cell.name for cell in cells(bench)]
    ['dense', 'svd @ 0.8', 'svd @ 0.6', 'swift-svd @ 0.8', 'swift-svd @ 0.6']
    """
    found = [Cell("dense", "dense", {})] if bench.dense else []
    found += [Cell("int8", "int8", {})] if bench.int8 else []
    crossed = [_cell(name, values) for name, values in _combinations(bench)]
    bad = [cell.error for cell in crossed if cell.error is not None]
    if bad and len(bad) == len(crossed):
        raise bad[0]
    own = [_cell(name, values) for name, values in _own_runs(bench)]
    for cell in own:
        if cell.error is not None:
            raise cell.error
    low_rank = [*crossed, *own]
    found += [x for cell in low_rank for x in _with_int8(cell)] if bench.int8_factors else low_rank
    if not found:
        raise RecipeError("nothing is to be measured: name shares to keep, or runs of their own")
    names = [cell.name for cell in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"two rows would be named '{twice}'; name one of them anew")
    return found


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, key by key, all the way down.

    Examples
    --------
    >>> merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}})
    {'a': {'b': 4, 'c': 2}, 'd': {'e': 5}}
    """
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        result[key] = value
    return result


def _base(bench: BenchRecipe) -> dict[str, Any]:
    return merged({"calibration": {"seed": bench.seed}}, bench.base)


def _combinations(bench: BenchRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and recipes of the grid, or of the base where nothing else is to be made."""
    if bench.grid is None and bench.runs:
        return
    grid = bench.grid or {}
    for chosen in itertools.product(*grid.values()):
        values = _base(bench)
        for key, value in zip(grid, chosen, strict=True):
            values = merged(values, _nested(key, value))
        varied = [
            _label(key, value)
            for key, value in zip(grid, chosen, strict=True)
            if len(grid[key]) > 1
        ]
        fixed = [_label(key, value) for key, value in zip(grid, chosen, strict=True)]
        name = " ".join(varied or fixed[:1] or ["base"])
        for keep in bench.keep:
            yield f"{name} @ {keep:g}", merged(values, {"budget": {"param_ratio": keep}})


def _own_runs(bench: BenchRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and recipes of the runs of their own, at every size or at the one they name."""
    for run in bench.runs:
        values = merged(_base(bench), run.recipe)
        if "param_ratio" in (run.recipe.get("budget") or {}):
            yield run.name, values
            continue
        if not bench.keep:
            raise RecipeError(f"run '{run.name}': neither it nor `keep` says how much to keep")
        for keep in bench.keep:
            yield f"{run.name} @ {keep:g}", merged(values, {"budget": {"param_ratio": keep}})


def _cell(name: str, values: dict[str, Any]) -> Cell:
    try:
        return Cell(name, "low-rank", values, CompressionRecipe.from_dict(values, name))
    except SlimrankError as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError) and any(
            part["type"] == "extra_forbidden" for part in cause.errors()
        ):
            raise
        return Cell(name, "low-rank", values, error=error)


def _with_int8(cell: Cell) -> Iterator[Cell]:
    yield cell
    if cell.error is None:
        yield replace(cell, name=f"{cell.name}, int8", int8_factors=True)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Mapping of a dotted key."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _label(key: str, value: Any) -> str:
    """A value in a name: words as they are, all else with its key.

    Examples
    --------
    >>> _label("method", "svd"), _label("calibration.seed", 1), _label("refine", {"epochs": 3})
    ('svd', 'seed=1', 'refine(epochs=3)')
    """
    last = key.rsplit(".", 1)[-1]
    if isinstance(value, str):
        return f"{last}={value}" if value in ("auto", "off", "on", "none") else value
    if isinstance(value, Mapping):
        return f"{last}({', '.join(f'{k}={v}' for k, v in value.items())})"
    return f"{last}={value}"
