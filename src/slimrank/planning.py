"""From a model's shapes and a recipe to targets and ranks, before any work."""

import warnings
from pathlib import Path

from torch import nn

from slimrank.allocation import LinearShape, RankPlan
from slimrank.calibration import default_batch_size
from slimrank.checkpoint import folder_bytes
from slimrank.errors import SlimrankWarning
from slimrank.methods import STREAMS
from slimrank.model import Anatomy
from slimrank.recipe import CompressionRecipe
from slimrank.report import PlannedLinear, PlanReport
from slimrank.source import load_skeleton, parse_source, require_dense
from slimrank.targets import Work, find_work

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


def plan(model: str | Path | nn.Module, recipe: CompressionRecipe) -> PlanReport:
    """Say what a recipe would do: ranks, parameters, bytes, memory. Reads no weight.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id, a ``.gguf`` file, or a model; one on the meta device will do.
    recipe : CompressionRecipe

    Returns
    -------
    PlanReport

    Raises
    ------
    ModelError
        If the model cannot be read or has no blocks of linears.
    RecipeError
        If a target matches nothing.
    BudgetError
        If no ranks meet the budget.
    """
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
        report = _plan(skeleton, name, work, recipe)
    told = [str(w.message) for w in caught if issubclass(w.category, SlimrankWarning)]
    told += DYNAMIC[recipe.allocation]
    return report.model_copy(update={"warnings": tuple(told)})


def _plan(skeleton: nn.Module, name: str, work: Work, recipe: CompressionRecipe) -> PlanReport:
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
    memory = calibration_memory(skeleton, anatomy, ranks, recipe)
    factored = {name: rank for name, rank in ranks.ranks.items() if rank is not None}
    pivoted = {s.name for s in work.shapes if s.name in factored and s.is_pivoted(factored[s.name])}
    size = work.size(ranks, folder_bytes(skeleton, factored, pivoted))
    return PlanReport(
        model=name,
        method=recipe.method,
        size=size,
        linears=linears,
        kv_cache=work.kv_cache,
        memory_bytes=memory,
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


def calibration_memory(
    model: nn.Module, anatomy: Anatomy, ranks: RankPlan, recipe: CompressionRecipe
) -> dict[str, int]:
    """Estimate resident bytes while calibrating, by what holds them.

    Activations are those of one batch inside one block: what every linear takes and gives, in the
    model's dtype, and a float32 copy of the widest input.
    """
    width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    result = {"model": weights, "moments": 0, "hidden_states": 0, "activations": 0, "solve": 0}
    shapes: list[LinearShape] = [s.shape for s in anatomy.sites if ranks.ranks[s.name] is not None]
    if shapes:
        # Weight, target and basis, the output moment and what its eigenvectors take; all float64.
        result["solve"] = max(
            8
            * (3 * s.dense_params + 4 * min(s.out_features, s.in_features) ** 2 + s.in_features**2)
            for s in shapes
        )
    needs = recipe.make_method().needs
    if recipe.passes == 2:
        result["model"] += weights  # of the first pass
    if recipe.tune is not None:
        kept = sum(s.shape.params(ranks.ranks[s.name]) for s in anatomy.sites)
        result["tuning"] = 16 * kept  # masters, gradients and two moments, all float32
    if needs or recipe.is_sequential:
        sample = recipe.calibration
        hidden = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        count = sample.num_sequences + recipe.generated_sequences
        tokens = count * sample.sequence_length
        result["hidden_states"] = tokens * hidden * width
        # Two accumulators each (all batches, last batch), and their results.
        result["moments"] = max(
            sum(4 * 8 * group.in_features**2 for group in block) for block in anatomy.groups
        )
        if recipe.is_sequential:
            tokens += sample.held_out_sequences * sample.sequence_length
            # In front of a block and behind it, in two streams; all inputs of the original block.
            result["hidden_states"] = 4 * tokens * hidden * width
            if needs >= STREAMS:
                widest = max(sum(group.in_features for group in block) for block in anatomy.groups)
                result["hidden_states"] += tokens * width * widest
                result["moments"] *= 2
            result["model"] += max(
                (sum(width * s.shape.dense_params for g in b for s in g.sites))
                for b in anatomy.groups
            )
        tokens = default_batch_size(sample.sequence_length) * sample.sequence_length
        result["activations"] = tokens * max(
            sum(width * (s.shape.in_features + s.shape.out_features) for g in b for s in g.sites)
            + 4 * max((g.in_features for g in b), default=0)
            for b in anatomy.groups
        )
    if recipe.needs & {"gradients", "mean_gradients"}:
        # Metrics and mean gradients in float32, and the hidden states in front of every block.
        metrics = sum(4 * site.shape.out_features**2 for site in anatomy.sites)
        if "mean_gradients" in recipe.needs:
            metrics += sum(4 * site.shape.dense_params for site in anatomy.sites)
        tokens = recipe.calibration.num_sequences * recipe.calibration.sequence_length
        hidden = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        result["gradients"] = metrics + (len(anatomy.groups) + 1) * tokens * hidden * width
    result["total"] = sum(result.values())
    return result
