"""From a model's shapes and a recipe to ranks, before any work."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimrank.allocation import LinearShape, RankPlan, uniform
from slimrank.calibration import default_batch_size
from slimrank.checkpoint import folder_bytes
from slimrank.errors import SlimrankWarning
from slimrank.methods import method_by_name
from slimrank.model import Anatomy, block_path, discover, list_sites, select_targets
from slimrank.recipe import CompressionRecipe
from slimrank.report import PlannedLinear, PlanReport, SizeReport
from slimrank.source import load_skeleton, parse_source, require_dense

PROBE_TOKENS = 12
SCALE_BYTES = 2


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
        anatomy, ranks = allocate(skeleton, recipe)
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
    size = planned_size(skeleton, anatomy, ranks)
    return PlanReport(
        model=name,
        method=recipe.method,
        size=size,
        linears=linears,
        memory_bytes=memory,
        inputs=sum(len(block) for block in anatomy.groups),
        warnings=tuple(str(w.message) for w in caught if issubclass(w.category, SlimrankWarning)),
    )


def allocate(model: nn.Module, recipe: CompressionRecipe) -> tuple[Anatomy, RankPlan]:
    """Find the targeted linears and share the budget out among them.

    Returns
    -------
    anatomy : Anatomy
        Of the targeted linears only.
    ranks : RankPlan
    """
    path = block_path(model, recipe.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimrankWarning)  # `discover` looks again and warns
        names = [site.name for site in list_sites(model, path)]
    every = [name for name, _ in model.named_modules()]
    targets = select_targets(names, recipe.targets, recipe.ignore, every)
    device = next(model.parameters()).device
    probe = torch.arange(PROBE_TOKENS, device=device)[None] % num_embeddings(model)
    anatomy = discover(model, probe, path).only(targets)
    shapes = [site.shape for site in anatomy.sites]
    other = sum(p.numel() for p in model.parameters()) - sum(s.dense_params for s in shapes)
    return anatomy, uniform(shapes, recipe.budget.budget(), other)


def num_embeddings(model: Any) -> int:
    """Rows of the embedding: the token ids that the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def planned_size(model: nn.Module, anatomy: Anatomy, ranks: RankPlan) -> SizeReport:
    """Budget line of a plan, from a dense model of any device."""
    shapes = [site.shape for site in anatomy.sites]
    before = sum(shape.dense_params for shape in shapes)
    total = sum(p.numel() for p in model.parameters())
    after = ranks.params(shapes)
    dense = folder_bytes(model)
    factored = {name: rank for name, rank in ranks.ranks.items() if rank is not None}
    return SizeReport(
        target_params_before=before,
        target_params=after,
        model_params_before=total,
        model_params=total - before + after,
        weight_bytes_before=dense,
        weight_bytes=folder_bytes(model, factored),
        int8_bytes=dense - int8_savings(model, anatomy.path),
    )


def int8_savings(model: nn.Module, path: str) -> int:
    """Bytes that int8 saves on the linears of the blocks, one scale of two bytes an output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimrankWarning)
        sites = list_sites(model, path)
    saved = 0
    for site in sites:
        width = model.get_submodule(site.name).weight.element_size()  # type: ignore[operator]
        saved += site.shape.dense_params * (width - 1) - SCALE_BYTES * site.shape.out_features
    return saved


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
    if method_by_name(recipe.method).needs_moments:
        sample = recipe.calibration
        hidden = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        result["hidden_states"] = sample.num_sequences * sample.sequence_length * hidden * width
        # Two accumulators each (all batches, last batch), and their results.
        result["moments"] = max(
            sum(4 * 8 * group.in_features**2 for group in block) for block in anatomy.groups
        )
        tokens = default_batch_size(sample.sequence_length) * sample.sequence_length
        result["activations"] = tokens * max(
            sum(width * (s.shape.in_features + s.shape.out_features) for g in b for s in g.sites)
            + 4 * max((g.in_features for g in b), default=0)
            for b in anatomy.groups
        )
    result["total"] = sum(result.values())
    return result
