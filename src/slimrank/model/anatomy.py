"""Blocks, linears and shared inputs of a model, found by looking and by one forward.

Nothing here knows the name of an architecture. The block list is the one outermost ``ModuleList``
that holds linears; pre-hooks during one short forward tell which linears receive the very same
tensor (q, k and v; gate and up; in Falcon attention and MLP) and in which order they run.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from slimrank.allocation import Layout, LinearShape
from slimrank.errors import CoverageWarning, ModelError


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear of a block.

    Parameters
    ----------
    name : str
        Full dotted name in the model.
    block : int
        Position in the block list.
    shape : LinearShape
    has_bias : bool
    """

    name: str
    block: int
    shape: LinearShape
    has_bias: bool


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that receive the same tensor: one second moment serves them all."""

    sites: tuple[LinearSite, ...]

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.sites[0].shape.in_features


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What `discover` found.

    Parameters
    ----------
    path : str
        Dotted name of the block list.
    groups : tuple of tuple of InputGroup
        For each block, its groups in call order.
    extra_outputs : int or None
        None if blocks return a tensor; else how many items follow it in the tuple they return.
    """

    path: str
    groups: tuple[tuple[InputGroup, ...], ...]
    extra_outputs: int | None

    @property
    def sites(self) -> Iterator[LinearSite]:
        """All linears, in call order."""
        return (site for block in self.groups for group in block for site in group.sites)

    def laid_out(self, layout: Layout) -> "Anatomy":
        """The same linears, with factors to be stored in a layout."""
        kept = [
            [
                InputGroup(
                    tuple(replace(s, shape=replace(s.shape, layout=layout)) for s in group.sites)
                )
                for group in block
            ]
            for block in self.groups
        ]
        return replace(self, groups=tuple(tuple(block) for block in kept))

    def only(self, names: Iterable[str]) -> "Anatomy":
        """Keep some linears; groups that lose all of theirs go."""
        wanted = set(names)
        kept = [
            [
                InputGroup(sites)
                for group in block
                if (sites := tuple(s for s in group.sites if s.name in wanted))
            ]
            for block in self.groups
        ]
        return Anatomy(self.path, tuple(tuple(block) for block in kept), self.extra_outputs)


def block_path(model: nn.Module, path: str | None = None) -> str:
    """Dotted name of the list of decoder blocks.

    Parameters
    ----------
    model : nn.Module
    path : str, optional
        Take this one, after a check.

    Raises
    ------
    ModelError
        If there is none, or several, with their names and the recipe key that settles it.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(map(_is_matrix, module.modules()))
    }
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    kind = type(model).__name__
    if path is not None:
        if path not in lists:
            raise ModelError(f"{kind} has no block list '{path}'; candidates: {outermost}")
        return path
    if not outermost:
        raise ModelError(f"{kind} has no list of blocks that hold linears; nothing to compress")
    if len(outermost) > 1:
        raise ModelError(
            f"{kind} has several lists of blocks, {outermost}; name one in the recipe: 'blocks'"
        )
    return str(outermost[0])


def list_sites(model: nn.Module, path: str) -> list[LinearSite]:
    """All linears of the blocks that low rank can take, in order of registration.

    Routers of mixture-of-experts blocks are left out: they are tiny and decide everything.

    Raises
    ------
    ModelError
        If a linear is not an ``nn.Linear`` of plain floats, or is shared between blocks.

    Warns
    -----
    CoverageWarning
        If a block holds fused expert tensors, which stay dense.
    """
    sites: list[LinearSite] = []
    seen: dict[int, str] = {}
    fused: list[str] = []
    for index, block in enumerate(_blocks(model, path)):
        routers = set(_routers(block))
        fused += [f"{path}.{index}.{n}" for n in _fused_tensors(block)]
        for local, module in block.named_modules(remove_duplicate=False):
            name = f"{path}.{index}.{local}"
            if isinstance(module, Conv1D):
                raise ModelError(
                    f"{name} is a Conv1D, the transposed linear of GPT-2, which is not supported"
                )
            if not isinstance(module, nn.Linear) or module in routers:
                continue
            _require_plain(name, module)
            if id(module.weight) in seen:
                raise ModelError(
                    f"{name} shares its weight with {seen[id(module.weight)]}; linears with shared "
                    "weights are not supported"
                )
            seen[id(module.weight)] = name
            shape = LinearShape(name, module.out_features, module.in_features)
            sites.append(LinearSite(name, index, shape, module.bias is not None))
    if fused:
        warnings.warn(
            f"{len(fused)} fused tensors stay dense (experts in one tensor, such as {fused[0]}); "
            "they count as parameters outside the targets",
            CoverageWarning,
            stacklevel=2,
        )
    return sites


@torch.no_grad()
def discover(model: nn.Module, probe: Tensor, path: str | None = None) -> Anatomy:
    """Find blocks, linears, shared inputs and call order with one forward.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, in eval mode; on the meta device too.
    probe : Tensor of shape (1, tokens), int64
        Token ids; a dozen are enough.
    path : str, optional
        The block list, if it cannot be told (see `block_path`).

    Returns
    -------
    Anatomy
        Linears that the probe did not reach (experts that got no token) are groups of their own.

    Raises
    ------
    ModelError
        See `block_path` and `list_sites`.
    """
    path = block_path(model, path)
    sites = {site.name: site for site in list_sites(model, path)}
    calls: list[tuple[str, Tensor]] = []
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for name in sites:
            handle = model.get_submodule(name).register_forward_pre_hook(_recorder(name, calls))
            hooks.callback(handle.remove)
        handle = _blocks(model, path)[-1].register_forward_hook(_watcher(outputs))
        hooks.callback(handle.remove)
        _run_backbone(model, probe)
    groups = _group([(sites[name], tensor) for name, tensor in calls])
    reached = {name for name, _ in calls}
    groups += [InputGroup((site,)) for site in sites.values() if site.name not in reached]
    num_blocks = len(_blocks(model, path))
    by_block = tuple(
        tuple(group for group in groups if group.sites[0].block == block)
        for block in range(num_blocks)
    )
    return Anatomy(path, by_block, _extra_outputs(outputs))


@torch.no_grad()
def outline(model: nn.Module, probe: Tensor, path: str | None = None) -> Anatomy:
    """Find the blocks alone, without a look at their linears: of a compressed model too.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, in eval mode.
    probe : Tensor of shape (1, tokens), int64
    path : str, optional
        The block list, if it cannot be told (see `block_path`).

    Returns
    -------
    Anatomy
        Without groups.

    Raises
    ------
    ModelError
        See `block_path`.
    """
    path = block_path(model, path)
    outputs: list[Any] = []
    handle = _blocks(model, path)[-1].register_forward_hook(_watcher(outputs))
    try:
        _run_backbone(model, probe)
    finally:
        handle.remove()
    return Anatomy(path, (), _extra_outputs(outputs))


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _blocks(model: nn.Module, path: str) -> Sequence[nn.Module]:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def _require_plain(name: str, linear: nn.Linear) -> None:
    """Refuse packed and quantised linears: their weight is not the matrix."""
    plain = linear.weight.is_floating_point() and linear.weight.shape == (
        linear.out_features,
        linear.in_features,
    )
    if not plain:
        raise ModelError(
            f"{name} is no plain floating-point linear ({type(linear).__name__}, "
            f"{linear.weight.dtype}); compress first, quantise afterwards"
        )


def _routers(block: nn.Module) -> Iterator[nn.Linear]:
    """Linears that choose among experts: beside N experts, with N outputs."""
    for parent in block.modules():
        children = list(parent.children())
        counts = {len(c) for c in children if isinstance(c, nn.ModuleList)}
        counts |= {p.shape[0] for c in children for p in c.parameters(recurse=False) if p.ndim == 3}
        for child in children:
            if isinstance(child, nn.Linear) and child.out_features in counts:
                yield child


def _fused_tensors(block: nn.Module) -> Iterator[str]:
    """Parameters of three axes outside convolutions: many matrices in one tensor."""
    for name, module in block.named_modules():
        if not isinstance(module, _ConvNd):
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2:
                    yield f"{name}.{local}"


def _recorder(name: str, calls: list[tuple[str, Tensor]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((name, args[0]))

    return hook


def _watcher(outputs: list[Any]) -> Any:
    return lambda _module, _args, output: outputs.append(output)


def _extra_outputs(outputs: list[Any]) -> int | None:
    """How many items follow the hidden states; None if a block returns them alone."""
    return len(outputs[0]) - 1 if outputs and isinstance(outputs[0], tuple) else None


def _group(calls: list[tuple[LinearSite, Tensor]]) -> list[InputGroup]:
    """Put together what was called on the same tensor, which `calls` keeps alive."""
    members: dict[tuple[int, int, int], list[LinearSite]] = {}
    for site, tensor in calls:
        key = (id(tensor), tensor._version, site.block)
        mates = members.setdefault(key, [])
        if not any(site in group for group in members.values()):
            mates.append(site)
    return [InputGroup(tuple(group)) for group in members.values() if group]


def _run_backbone(model: nn.Module, probe: Tensor) -> None:
    """Run the model without its head. On the meta device a ready mask spares a look at values."""
    backbone = getattr(model, "base_model", model)
    if probe.device.type != "meta":
        backbone(input_ids=probe, use_cache=False)
        return
    length = probe.shape[1]
    mask = torch.zeros(1, 1, length, length, device="meta")
    try:
        backbone(input_ids=probe, attention_mask=mask, position_ids=probe, use_cache=False)
    except (RuntimeError, NotImplementedError):
        # Some forwards look at values (routing to experts) and cannot end on the meta device.
        # What was not reached then counts as having an input of its own: an upper bound.
        return
