"""Make the model of a cell in memory, and say what it takes."""

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from slimrank.checkpoint import folder_bytes
from slimrank.compression import compress
from slimrank.environment import Clock, peak_bytes
from slimrank.frontier.cells import Cell
from slimrank.frontier.dense import DenseModel, Fingerprints
from slimrank.frontier.int8 import quantize_linears, round_low_rank
from slimrank.frontier.store import ResultStore
from slimrank.options import CompressionOptions
from slimrank.profiling import profile, served_alike
from slimrank.recipe import CompressionRecipe


@dataclass(frozen=True, slots=True)
class Made:
    """A model, and the part of its row that is known before it is measured.

    `targets` names its targeted linears; the other fields are those of `Measured`.
    """

    model: Any
    bytes: int
    linear_bytes: int
    params: int
    target_params: int
    targets: tuple[str, ...]
    phases: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    warnings: tuple[str, ...] = ()


def make(
    cell: Cell,
    dense: DenseModel,
    store: ResultStore,
    fingerprints: Fingerprints,
    options: CompressionOptions,
) -> Made:
    """Make a cell's model from a copy of the dense one; a profile is made once for all sizes.

    Raises
    ------
    SlimrankError
        See `slimrank.compress` and `slimrank.frontier.int8`.
    """
    reset_peak()
    if cell.recipe is not None:
        made = _compress(cell.recipe, dense, store, fingerprints, options)
    else:
        made = _baseline(cell, dense)
    made = replace(made, peak_bytes=peak_bytes())
    return in_int8(made) if cell.int8_factors else made


def in_int8(made: Made) -> Made:
    """Round the factors of a model, in place; its making is counted in, its parameters stay.

    Raises
    ------
    SlimrankError
        See `slimrank.frontier.int8.round_low_rank`.
    """
    reset_peak()
    clock = Clock()
    with clock.phase("round to int8"):
        round_low_rank(made.model)
    return replace(
        made,
        bytes=folder_bytes(made.model, aligned=True),
        linear_bytes=linear_bytes(made.model, made.targets),
        phases=made.phases | clock.seconds,
        peak_bytes=max(made.peak_bytes, peak_bytes()),
    )


def served_by_profile(recipe: CompressionRecipe) -> CompressionRecipe | None:
    """Recipe of the profile that a recipe can be made from, or take its ranks from; None if none.

    What a profile does not depend on is set to its default, so that all sizes share one.

    Examples
    --------
    >>> one, other = (CompressionRecipe(budget={"param_ratio": x}) for x in (0.8, 0.6))
    >>> served_by_profile(one) == served_by_profile(other)
    True
    >>> evenly = one.model_copy(update={"method": "svd", "allocation": "uniform"})
    >>> served_by_profile(evenly) is None
    True
    """
    wanted = recipe.for_profile()
    is_built = wanted == recipe and not recipe.is_sequential
    if not recipe.is_of_text_alone or (not is_built and recipe.allocation == "uniform"):
        return None
    return served_alike(wanted)


def linear_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of linears as stored, dense or factorised, biases left out."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name in names
        for key, tensor in model.get_submodule(name).state_dict().items()
        if key != "bias"
    )


def reset_peak() -> None:
    """Have the largest resident memory counted from here on; Linux only, no more than tried."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _compress(
    recipe: CompressionRecipe,
    dense: DenseModel,
    store: ResultStore,
    fingerprints: Fingerprints,
    options: CompressionOptions,
) -> Made:
    """Compress a copy of the dense model, from a profile where the recipe allows it."""
    served, folder, phases = served_by_profile(recipe), None, {}
    if served is not None:
        key = fingerprints.of_profile(served, dense)
        opened, folder = store.read_profile(key), store.profile_folder(key)
        if opened is None:
            opened = profile(
                dense.model,
                served,
                folder,
                tokenizer=dense.tokenizer,
                options=options,
                resume=True,
            )
        phases = {f"profile: {name}": s for name, s in opened.manifest.seconds.items()}
    model = copy.deepcopy(dense.model)
    report = compress(model, recipe, tokenizer=dense.tokenizer, profile=folder, options=options)
    targets = tuple(linear.name for linear in report.linears)
    return Made(
        model=model,
        bytes=report.size.weight_bytes,
        linear_bytes=linear_bytes(model, targets),
        params=report.size.model_params,
        target_params=report.size.target_params,
        targets=targets,
        phases=phases | report.seconds,
        warnings=report.warnings,
    )


def _baseline(cell: Cell, dense: DenseModel) -> Made:
    """The dense model itself, or a copy of it in int8."""
    model, clock = dense.model, Clock()
    total, linears = folder_bytes(model), linear_bytes(model, dense.targets)
    params = sum(p.numel() for p in model.parameters())
    targets = sum(model.get_submodule(name).weight.numel() for name in dense.targets)
    if cell.kind == "int8":
        model = copy.deepcopy(model)
        with clock.phase("quantize"):
            total, linears = quantize_linears(model, dense.targets)
    return Made(model, total, linears, params, targets, dense.targets, clock.seconds)
