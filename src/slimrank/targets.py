"""What a recipe means on a model: its linears, the inputs they share, what the cache asks for."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from slimrank.allocation import LinearShape, RankPlan, uniform
from slimrank.checkpoint import folder_bytes
from slimrank.errors import BudgetError, RecipeError, SizeWarning, SlimrankWarning
from slimrank.model import (
    Anatomy,
    AttentionSite,
    block_path,
    discover,
    find_attention,
    list_sites,
    replace_linear,
    select_targets,
    split_fused,
)
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.report import KVCacheReport, SizeReport

PROBE_TOKENS = 12
SCALE_BYTES = 2
SPLIT_PARTS = ("rest", "keys", "values")


@dataclass(frozen=True, slots=True)
class Work:
    """What a recipe means on a model.

    Parameters
    ----------
    anatomy : Anatomy
        Of the targeted linears only.
    other_params : int
        Parameters of the model outside them.
    dense_bytes, int8_bytes : int
        Of the weight files of the dense model, and of it with the linears of its blocks in int8.
    fixed : dict of str to int
        Ranks that the key/value cache asks for.
    attentions : dict of str to (str, str)
        For each attention, the linears of its keys and values; empty if nobody asked.
    kv_cache : KVCacheReport or None
    fused : dict of str to nn.Linear
        Projections that were split to get at their keys and values, as they were.
    """

    anatomy: Anatomy
    other_params: int
    dense_bytes: int
    int8_bytes: int
    fixed: dict[str, int]
    attentions: dict[str, tuple[str, str]]
    kv_cache: KVCacheReport | None
    fused: dict[str, nn.Linear]

    @property
    def shapes(self) -> list[LinearShape]:
        """Shapes of the targeted linears."""
        return [site.shape for site in self.anatomy.sites]

    def uniform(self, recipe: CompressionRecipe) -> RankPlan:
        """Share the budget out evenly."""
        return uniform(self.shapes, recipe.budget.budget(), self.other_params, self.fixed)

    def size(self, ranks: RankPlan, weight_bytes: int) -> SizeReport:
        """Budget line of a plan whose weight files have so many bytes."""
        before = sum(shape.dense_params for shape in self.shapes)
        after = ranks.params(self.shapes)
        return SizeReport(
            target_params_before=before,
            target_params=after,
            model_params_before=self.other_params + before,
            model_params=self.other_params + after,
            weight_bytes_before=self.dense_bytes,
            weight_bytes=weight_bytes,
            int8_bytes=self.int8_bytes,
        )

    @property
    def names(self) -> list[str]:
        """Names of the targeted linears."""
        return [site.name for site in self.anatomy.sites]

    def useful_rank(self, shape: LinearShape) -> int:
        """Largest rank that may be asked for: break-even, or all for keys and values."""
        if any(shape.name in pair for pair in self.attentions.values()):
            return min(shape.out_features, shape.in_features)
        return shape.break_even_rank

    @contextmanager
    def put_back_after(self, model: nn.Module) -> Iterator[None]:
        """Leave the model as it was before any projection was split, whatever happens."""
        try:
            yield
        finally:
            _put_back(model, self.fused)

    @contextmanager
    def put_back_on_error(self, model: nn.Module) -> Iterator[None]:
        """Leave a user's model as it was if a run fails half-way: linears, norms and biases."""
        linears = {name: model.get_submodule(name) for name in self.names} | self.fused
        vectors = [(p, p.detach().clone()) for p in model.parameters() if p.ndim == 1]
        try:
            yield
        except BaseException:
            _put_back(model, linears)
            for parameter, values in vectors:
                parameter.data = values
            raise


def find_work(
    model: nn.Module,
    recipe: CompressionRecipe,
    for_kv_cache: bool = False,
    split_alike: bool = False,
) -> Work:
    """Find the targeted linears, their shared inputs, and what makes keys and values.

    With a key/value cache of latents, the linears of keys and values are targets whatever `targets`
    says, and projections that give queries, keys and values at once are split in place.

    Parameters
    ----------
    model : nn.Module
        Dense; on the meta device too. As it was if an error is raised.
    recipe : CompressionRecipe
    for_kv_cache : bool
        Find keys and values even if the recipe leaves the cache alone.
    split_alike : bool
        Split the targeted fused projections even so, but target no more than the recipe says: for a
        profile that was made for a cache of latents.

    Raises
    ------
    ModelError
        If the model has no blocks of linears, or its keys and values cannot be traced.
    RecipeError
        If a target matches nothing.
    BudgetError
        If the cache leaves a linear less than the smallest rank.
    """
    path = block_path(model, recipe.blocks)
    dense_bytes = folder_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlimrankWarning)  # `discover` looks again and warns
        names = [site.name for site in list_sites(model, path)]
    every = [name for name, _ in model.named_modules()]
    targets = select_targets(names, recipe.targets, recipe.ignore, every)
    of_latents = for_kv_cache or recipe.kv_cache is not None
    sites = find_attention(model, path) if of_latents or split_alike else []
    sites = sites if of_latents else [site for site in sites if site.keys in targets]
    fused = {s.keys: _linear(model, s.keys) for s in sites if s.key_rows is not None}
    attentions = {s.name: _key_and_value(s) for s in sites} if of_latents else {}
    try:
        split_fused(model, sites)
        targets += [f"{name}.{part}" for name in fused if name in targets for part in SPLIT_PARTS]
        return _work(model, recipe, path, targets, attentions, fused, dense_bytes)
    except BaseException:
        _put_back(model, fused)
        raise


def _work(
    model: nn.Module,
    recipe: CompressionRecipe,
    path: str,
    targets: list[str],
    attentions: dict[str, tuple[str, str]],
    fused: dict[str, nn.Linear],
    dense_bytes: int,
) -> Work:
    """Discover the targets in a model whose fused projections are split."""
    wanted = {*targets, *(name for pair in attentions.values() for name in pair)}
    probe = probe_ids(model).to(next(model.parameters()).device)
    anatomy = discover(model, probe, path).only(wanted).laid_out(recipe.layout)
    sizes = {site.name: site.shape for site in anatomy.sites}
    targeted = sum(shape.dense_params for shape in sizes.values())
    fixed, kv_cache = _latents(model, recipe, attentions, sizes)
    return Work(
        anatomy=anatomy,
        other_params=sum(p.numel() for p in model.parameters()) - targeted,
        dense_bytes=dense_bytes,
        int8_bytes=dense_bytes - int8_savings(model, path),
        fixed=fixed,
        attentions=attentions,
        kv_cache=kv_cache,
        fused=fused,
    )


def _put_back(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    for name, linear in linears.items():
        replace_linear(model, name, linear)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _key_and_value(site: AttentionSite) -> tuple[str, str]:
    """Names of the linears of keys and values, once fused ones are split."""
    if site.key_rows is None:
        return site.keys, site.values
    return f"{site.keys}.keys", f"{site.values}.values"


def _latents(
    model: nn.Module,
    recipe: CompressionRecipe,
    attentions: dict[str, tuple[str, str]],
    shapes: dict[str, LinearShape],
) -> tuple[dict[str, int], KVCacheReport | None]:
    """Ranks of keys and values, the same share of each, and what they come to."""
    if recipe.kv_cache is None:
        return {}, None
    share, budget = Fraction(str(recipe.kv_cache.keep)), recipe.budget.budget()
    fixed: dict[str, int] = {}
    for name in (name for pair in attentions.values() for name in pair):
        shape = shapes[name]
        most = min(int(share * shape.out_features), shape.in_features, shape.out_features)
        fixed[name] = most // budget.multiple_of * budget.multiple_of
        if fixed[name] < budget.smallest_rank:
            raise BudgetError(
                f"kv-keep {recipe.kv_cache.keep:g} leaves {name} rank {fixed[name]}, below the "
                f"smallest, {budget.smallest_rank}; it has {shape.out_features} features"
            )
    dense = sum(shapes[name].dense_params for name in fixed)
    params = sum(shapes[name].params(rank) for name, rank in fixed.items())
    if budget.param_ratio == 1 and params > dense:
        warnings.warn(
            f"at kv-keep {recipe.kv_cache.keep:g} the factors of keys and values take "
            f"{params - dense:,} parameters more than their matrices: less cache, more weights",
            SizeWarning,
            stacklevel=2,
        )
    return fixed, KVCacheReport(
        dense_values=sum(shapes[name].out_features for name in fixed),
        latent_values=sum(fixed.values()),
        value_bytes=next(p for p in model.parameters() if p.is_floating_point()).element_size(),
    )


def require_streamable(recipe: CompressionRecipe, options: CompressionOptions) -> None:
    """See that a recipe can be streamed, if it is to be.

    Raises
    ------
    RecipeError
        If it trains all blocks together.
    """
    if options.stream and recipe.tune is not None:
        raise RecipeError(
            "training all blocks together holds the whole model in memory; leave out --tune "
            "(--effort best has it) or --stream"
        )


def num_embeddings(model: Any) -> int:
    """Rows of the embedding: the token ids that the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def probe_ids(model: Any, tokens: int = PROBE_TOKENS) -> Int[Tensor, "1 tokens"]:
    """Token ids that a model knows, to look at it or to compare it with: 0, 1, 2 and so on."""
    return torch.arange(tokens)[None] % num_embeddings(model)


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
