"""What a model and a recipe come to in bytes, block by block, before any phase is looked at."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.allocation import LinearShape, RankPlan
from slimrank.calibration import default_batch_size
from slimrank.estimates.alive import (
    Sample,
    backward_bytes,
    forward_bytes,
    record_samples,
    training_bytes,
)
from slimrank.linalg.moments import STRIPES
from slimrank.model import InputGroup, LinearSite, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.targets import Work


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """One block.

    Parameters
    ----------
    path : str
        Of the block, or of one that is like it.
    dense_bytes, whole_bytes, factor_bytes : int
        Of its weights before; of all of them afterwards; and of the factors alone.
    largest_bytes : int
        Of its largest weight.
    groups : tuple of InputGroup
        Of targeted linears.
    ranks : dict of str to int or None
    forward, calibrate, backward, train : int
        Most that it holds while a batch passes it: alone; with moments summed; with gradients at
        its linears; trained, its gradients included.
    trained : int
        Numbers that training changes.
    """

    path: str
    dense_bytes: int
    whole_bytes: int
    factor_bytes: int
    largest_bytes: int
    groups: tuple[InputGroup, ...]
    ranks: Mapping[str, int | None]
    forward: int
    calibrate: int
    backward: int
    train: int
    trained: int

    @property
    def shapes(self) -> list[LinearShape]:
        """Of its targeted linears."""
        return [site.shape for group in self.groups for site in group.sites]

    @property
    def squares(self) -> list[int]:
        """Bytes of the second moment of each input."""
        return [8 * group.in_features**2 for group in self.groups]

    def rank(self, shape: LinearShape) -> int:
        """Of one of its linears; 0 for one that stays dense."""
        return self.ranks[shape.name.removeprefix(f"{self.path}.")] or 0

    @property
    def input_width(self) -> int:
        """Features of all distinct inputs."""
        return sum(group.in_features for group in self.groups)


@dataclass(frozen=True, slots=True)
class Facts:
    """A model and a recipe.

    Parameters
    ----------
    blocks : tuple of BlockFacts
    width : int
        Bytes of a number.
    hidden, vocabulary : int
        Features of hidden states; tokens that are told apart.
    model_bytes, embedding_bytes, head_bytes : int
    length, batch : int
        Tokens of a sequence; sequences at once.
    tokens, held_out : int
        To calibrate on, generated ones too; held out.
    cached : int
        Numbers in the keys of a token in one layer; those of its values are as many.
    """

    blocks: tuple[BlockFacts, ...]
    width: int
    hidden: int
    vocabulary: int
    model_bytes: int
    embedding_bytes: int
    head_bytes: int
    length: int
    batch: int
    tokens: int
    held_out: int
    cached: int

    @property
    def batch_states(self) -> int:
        """Bytes of the hidden states of one batch."""
        return self.batch * self.length * self.hidden * self.width

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.hidden * self.width

    @property
    def factor_bytes(self) -> int:
        """Of all factors."""
        return sum(block.factor_bytes for block in self.blocks)

    @property
    def largest_bytes(self) -> int:
        """Of the largest weight there is."""
        return max(self.embedding_bytes, self.head_bytes, *(b.largest_bytes for b in self.blocks))

    @property
    def replaced_bytes(self) -> int:
        """Of the weights that factors take the place of."""
        return sum(b.dense_bytes - b.whole_bytes + b.factor_bytes for b in self.blocks)


def find_facts(
    model: Any, work: Work, ranks: RankPlan, recipe: CompressionRecipe, options: CompressionOptions
) -> Facts:
    """Take a model apart; blocks that are alike are looked at once.

    Parameters
    ----------
    model : PreTrainedModel
        Only its shapes are looked at.
    work : Work
    ranks : RankPlan
    recipe : CompressionRecipe
    options : CompressionOptions
    """
    sample, anatomy = recipe.calibration, work.anatomy
    count = sample.num_sequences + recipe.generated_sequences
    size = options.batch_size or default_batch_size(sample.sequence_length)
    batch, length = max(1, min(size, count)), sample.sequence_length
    shapes = without_data(model, asks=not options.stream)
    samples = record_samples(shapes, anatomy, batch, length)
    head = shapes.get_output_embeddings()
    embedding = shapes.get_input_embeddings().weight
    routed = getattr(shapes.config, "num_experts_per_tok", None)
    experts = routed if isinstance(routed, int) else 1
    known: dict[Any, BlockFacts] = {}
    blocks: list[BlockFacts] = []
    for index, block in enumerate(shapes.get_submodule(anatomy.path).children()):
        path, groups = f"{anatomy.path}.{index}", anatomy.groups[index]
        own = {
            site.name.removeprefix(f"{path}."): ranks.ranks[site.name]
            for group in groups
            for site in group.sites
        }
        key = tuple(own.items()), tuple((n, p.shape) for n, p in block.named_parameters())
        if key not in known:
            found = samples[index] if samples else None
            known[key] = _Block(block, path, groups, own, batch * length, experts, found).facts()
        blocks.append(known[key])
    return Facts(
        blocks=tuple(blocks),
        width=embedding.element_size(),
        hidden=embedding.shape[1],
        vocabulary=embedding.shape[0],
        model_bytes=_bytes(shapes.parameters()),
        embedding_bytes=_bytes([embedding]),
        head_bytes=0 if head is None else _bytes([head.weight]),
        length=length,
        batch=batch,
        tokens=count * length,
        held_out=min(sample.held_out_sequences, count // 2) * length,
        cached=_cached(shapes.config, embedding.shape[1]),
    )


def _cached(config: Any, hidden: int) -> int:
    """Width of a token's keys, by the names that configurations use."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return hidden
    size = getattr(config, "head_dim", None) or hidden // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * size)


def without_data(model: Any, *, asks: bool = True) -> Any:
    """A copy of a model on the meta device, ties included.

    Parameters
    ----------
    model : PreTrainedModel
    asks : bool
        Whether weights may ask for gradients, as they do where they are loaded; mapped ones do not,
        and graphs are smaller for it.
    """
    shared: dict[int, Tensor] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        shared[id(parameter)] = nn.Parameter(empty, asks and parameter.requires_grad)
    for buffer in model.buffers():
        shared[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo=dict(shared))


@dataclass(frozen=True, slots=True)
class _Block:
    """A block without data, and what is to become of it; `experts` see each token."""

    block: nn.Module
    path: str
    groups: tuple[InputGroup, ...]
    ranks: Mapping[str, int | None]
    tokens: int
    experts: int
    sample: Sample | None

    def facts(self) -> BlockFacts:
        """Run it in all the ways that a run does."""
        sites = {
            site.name.removeprefix(f"{self.path}."): site
            for group in self.groups
            for site in group.sites
        }
        first = {g.sites[0].name.removeprefix(f"{self.path}."): g.in_features for g in self.groups}
        width = next(self.block.parameters()).element_size()
        summed = {name: partial(product_bytes, size, width) for name, size in first.items()}
        pulled = {
            name: partial(product_bytes, site.shape.out_features, 4) for name, site in sites.items()
        }
        small = self._compressed()
        factors = [m for m in small.modules() if isinstance(m, LowRankLinear)]
        vectors = sum(p.numel() for p in small.parameters() if p.ndim == 1)
        numbers = sum(self._numbers(site, self.ranks[name]) for name, site in sites.items())
        plain = self._alone(forward_bytes, self.block, {})
        return BlockFacts(
            path=self.path,
            dense_bytes=_bytes(self.block.parameters()),
            whole_bytes=self._whole_bytes(sites),
            factor_bytes=self._factor_bytes(sites),
            largest_bytes=max(_bytes([p]) for p in self.block.parameters()),
            groups=self.groups,
            ranks=self.ranks,
            forward=plain,
            calibrate=self._alone(forward_bytes, self.block, summed),
            backward=self._alone(backward_bytes, self.block, list(sites), pulled),
            train=self._alone(training_bytes, small) if factors else 0,
            trained=numbers + vectors if factors else 0,
        )

    def _alone(self, run: Callable[..., int | None], block: nn.Module, *arguments: Any) -> int:
        """What such a run takes; by the widest linear where it cannot be told without data."""
        found = None if self.sample is None else run(block, self.sample, *arguments)
        if found is not None:
            return found
        sides = [side for p in block.parameters() if p.ndim > 1 for side in p.shape[-2:]]
        width = next(block.parameters()).element_size()
        with_graph = run is not forward_bytes
        return self.experts * self.tokens * max(sides) * (3 * width + with_graph * 4 * (width + 4))

    def _factor_bytes(self, sites: Mapping[str, LinearSite]) -> int:
        """Of its factors, pivots included."""
        return sum(self._bytes_of(site, self.ranks[name]) for name, site in sites.items())

    def _whole_bytes(self, sites: Mapping[str, LinearSite]) -> int:
        width = next(self.block.parameters()).element_size()
        gone = sum(
            width * site.shape.dense_params
            for name, site in sites.items()
            if self.ranks[name] is not None
        )
        return _bytes(self.block.parameters()) - gone + self._factor_bytes(sites)

    def _bytes_of(self, site: LinearSite, rank: int | None) -> int:
        if rank is None:
            return 0
        width = next(self.block.parameters()).element_size()
        return width * self._numbers(site, rank) + 4 * rank * site.shape.is_pivoted(rank)

    @staticmethod
    def _numbers(site: LinearSite, rank: int | None) -> int:
        """In the factors of one linear."""
        if rank is None:
            return 0
        sides = site.shape.out_features + site.shape.in_features
        return rank * (sides - rank * site.shape.is_pivoted(rank))

    def _compressed(self) -> nn.Module:
        """A copy with factors in it, which ask for gradients as norms and biases do."""
        small = copy.deepcopy(self.block)
        for name, rank in self.ranks.items():
            if rank is not None:
                linear = small.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                replace_linear(small, name, LowRankLinear.unfilled(linear, rank, "meta"))
        factors = {
            id(factor.weight)
            for module in small.modules()
            if isinstance(module, LowRankLinear)
            for factor in (module.latent, module.expand)
        }
        for parameter in small.parameters():
            parameter.requires_grad_(id(parameter) in factors or parameter.ndim == 1)
        return small


def product_bytes(features: int, width: int, tokens: int) -> int:
    """Bytes that summing ``xᵀx`` takes beside the sums: tokens about a centre, and a product.

    Or, at the first batch, the sums once more, about the centre that is settled then.

    Parameters
    ----------
    features, width : int
        Of the tokens: how many numbers, and bytes of each.
    tokens : int
    """
    wide = 0 if width == 4 else 4 * tokens * features
    product = 4 * tokens * features + 4 * features**2 // STRIPES
    return wide + max(product, 8 * features**2)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
