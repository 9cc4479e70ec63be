"""From a model's shapes and a recipe to targets and ranks, before any work."""

import warnings
from pathlib import Path

from torch import nn

from slimrank.allocation import RankPlan
from slimrank.checkpoint import folder_bytes
from slimrank.errors import SlimrankWarning
from slimrank.estimates import Run, find_facts, passes_of, phases_of
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.report import (
    NeedsReport,
    PassesReport,
    PhaseReport,
    PlannedLinear,
    PlanReport,
)
from slimrank.source import load_skeleton, parse_source, require_dense
from slimrank.targets import Work, find_work, require_streamable

DYNAMIC = {
    "uniform": [],
    "swift": [
        "the ranks shown are uniform ones; allocation 'swift' shares out the sum of each module "
        "type by spectra and importance, which are known after calibration; sizes are the same"
    ],
    "global": [
        "the ranks shown are uniform ones; allocation 'global' shares the same budget out by what "
        "each linear loses, which is known after calibration"
    ],
    "threshold": [
        "the ranks shown are uniform ones; allocation 'threshold' drops components anywhere until "
        "the same budget is met, in an order that is known after calibration"
    ],
}


def plan(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    options: CompressionOptions | None = None,
) -> PlanReport:
    """Say what a recipe would do: ranks, bytes, memory, disk, passes. Reads no weight.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id, a ``.gguf`` file, or a model; one on the meta device will do.
    recipe : CompressionRecipe
    options : CompressionOptions, optional
        How it would be run; what is held depends on it.

    Returns
    -------
    PlanReport

    Raises
    ------
    ModelError
        If the model cannot be read or has no blocks of linears.
    RecipeError
        If a target matches nothing, or what is asked for cannot be run so.
    BudgetError
        If no ranks meet the budget.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(config)
    >>> needs = plan(model, CompressionRecipe(budget={"param_ratio": 0.5})).needs
    >>> needs.passes.forwards, needs.passes.backwards
    (3.0, 1.0)
    """
    options = options or CompressionOptions()
    require_streamable(recipe, options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlimrankWarning)
        if isinstance(model, nn.Module):
            name, skeleton = type(model).__name__, model
            require_dense(model, name)
        else:
            name = str(model)
            skeleton = load_skeleton(parse_source(model), recipe.dtype)
        work = find_work(skeleton, recipe)
    with work.put_back_after(skeleton):
        report = _plan(skeleton, name, work, recipe, options)
    told = [str(w.message) for w in caught if issubclass(w.category, SlimrankWarning)]
    told += DYNAMIC[recipe.allocation]
    return report.model_copy(update={"warnings": tuple(told)})


def _plan(
    skeleton: nn.Module,
    name: str,
    work: Work,
    recipe: CompressionRecipe,
    options: CompressionOptions,
) -> PlanReport:
    """Share out the budget, and count."""
    anatomy, ranks = work.anatomy, work.uniform(recipe)
    linears = tuple(
        PlannedLinear(
            name=site.name,
            out_features=site.shape.out_features,
            in_features=site.shape.in_features,
            rank=ranks.ranks[site.name],
            params_before=site.shape.dense_params,
            params=site.shape.params(ranks.ranks[site.name]),
        )
        for site in anatomy.sites
    )
    factored = {name: rank for name, rank in ranks.ranks.items() if rank is not None}
    pivoted = {s.name for s in work.shapes if s.name in factored and s.is_pivoted(factored[s.name])}
    size = work.size(ranks, folder_bytes(skeleton, factored, pivoted, aligned=True))
    return PlanReport(
        model=name,
        method=recipe.method,
        size=size,
        linears=linears,
        kv_cache=work.kv_cache,
        needs=_needs(skeleton, work, ranks, recipe, options, size.weight_bytes),
        profile_bytes=profile_bytes(skeleton, work, recipe),
        inputs=sum(len(block) for block in anatomy.groups),
        warnings=(),
    )


def plan_profile(
    model: str | Path,
    recipe: CompressionRecipe,
    for_kv_cache: bool = False,
    spectra_only: bool = False,
) -> int:
    """Say how many bytes a profile will take on disk (see `slimrank.profile`). Reads no weight.

    Raises
    ------
    ModelError, RecipeError
        As `plan`.
    """
    skeleton = load_skeleton(parse_source(model), recipe.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimrankWarning)
        work = find_work(skeleton, recipe, for_kv_cache)
    return profile_bytes(skeleton, work, recipe, spectra_only)


def profile_bytes(
    model: nn.Module, work: Work, recipe: CompressionRecipe, spectra_only: bool = False
) -> int:
    """Bytes of a profile on disk, headers left out: bases in float32, spectra in float64.

    A method that looks at gradients has a second basis, the dual.
    """
    bases = 2 if "gradients" in recipe.for_profile().make_method().needs else 1
    total = 0
    for shape in work.shapes:
        rank = 0 if spectra_only else work.useful_rank(shape)
        width = max(4, model.get_submodule(shape.name).weight.element_size())  # type: ignore[operator]
        total += bases * width * shape.out_features * rank
        per_component = 16 if "mean_gradients" in recipe.needs else 8
        total += per_component * shape.full_rank + 8 * (rank + 1)
    return total


def _needs(
    model: nn.Module,
    work: Work,
    ranks: RankPlan,
    recipe: CompressionRecipe,
    options: CompressionOptions,
    output_bytes: int,
) -> NeedsReport:
    """Memory, disk and passes."""
    run = Run(
        facts=find_facts(model, work, ranks, recipe, options),
        recipe=recipe,
        options=options,
        profile_bytes=profile_bytes(model, work, recipe),
        spectra_bytes=profile_bytes(model, work, recipe, spectra_only=True),
        output_bytes=output_bytes,
    )
    phases, passes = phases_of(run), passes_of(recipe, len(run.facts.blocks))
    return NeedsReport(
        memory_bytes=max(phase.memory_bytes for phase in phases),
        device_bytes=max(phase.device_bytes for phase in phases),
        disk_bytes=max(phase.disk_bytes for phase in phases),
        stays_bytes=output_bytes,
        passes=PassesReport(
            forwards=passes.forwards,
            backwards=passes.backwards,
            held_out_forwards=passes.held_out,
            check_forwards=passes.checks,
        ),
        phases=tuple(
            PhaseReport(name=p.name, memory=p.memory, device=p.device, disk=p.disk) for p in phases
        ),
    )
