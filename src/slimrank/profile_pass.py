"""The pass of a profile: all that every size is made from, block after block, to disk."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank import processes
from slimrank.apart import made_apart
from slimrank.blockwise import (
    BlockPass,
    check_block,
    factor_tensors,
    pass_blocks,
    refilled,
    solve,
)
from slimrank.calibration import METRIC, ActivationStore, TokenWindows
from slimrank.checkpoint import ProfiledLinear
from slimrank.checkpoint.profile import SPECTRA, block_file, write_tensors
from slimrank.checkpoint.profile_state import ProfiledBlock, ProfileState
from slimrank.environment import Clock, gathered_warnings
from slimrank.errors import NumericalWarning
from slimrank.linalg import Moments
from slimrank.methods import KFACSVD
from slimrank.model import Anatomy, LinearSite
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.statistics import Statistics
from slimrank.targets import Work

PARTS = ("spectra", "bases", "half")


@dataclass(slots=True)
class _Profiled:
    """One linear: what the manifest says, what is kept, and a layer of half its largest rank."""

    entry: ProfiledLinear
    spectra: dict[str, Tensor]
    bases: dict[str, Tensor]
    half: LowRankLinear | None


@dataclass(frozen=True, slots=True)
class ProfilePass:
    """One pass of the original activations, which leaves bases and spectra in a folder.

    Parameters
    ----------
    folder : Path
        Where the files go.
    model : PreTrainedModel
        Left as it is.
    work : Work
    recipe : CompressionRecipe
    clock : Clock
    store : ActivationStore
        For hidden states on their way.
    spectra_only : bool
    statistics : Statistics or None
        What else the method looks at.
    state : ProfileState or None
        Keeps each finished block. Tokens only pass those that it holds already.
    """

    folder: Path
    model: Any
    work: Work
    recipe: CompressionRecipe
    clock: Clock
    store: ActivationStore
    spectra_only: bool
    statistics: Statistics | None
    state: ProfileState | None

    def take(self, windows: TokenWindows, options: CompressionOptions) -> dict[str, Any]:
        """Walk the blocks; write the bases of each, then all spectra.

        Returns
        -------
        dict of str to Any
            What the manifest has of it.

        Raises
        ------
        NumericalError
            If a weight or an activation is not finite, or a moment does not fit its tokens.
        """
        finished = len(self.state.finished) if self.state else 0
        count = len(self.work.anatomy.groups)
        spectra: dict[str, Tensor] = {}
        blocks: list[ProfiledBlock] = []
        so_far = dict(self.clock.seconds)
        for passed in pass_blocks(
            self.model,
            self.work.anatomy,
            windows,
            options,
            self.clock,
            self.store,
            count,
            "profiling",
            finished,
        ):
            if self.state is not None and passed.index < finished:
                block, found = self._known(self.state, passed.index)
            else:
                block, found = self._take_block(passed, so_far)
            so_far = dict(self.clock.seconds)
            blocks.append(block)
            spectra |= found
        files = {name: digest for block in blocks for name, digest in block.files.items()}
        return {
            "importance": tuple(block.influence for block in blocks),
            "importance_after_norm": blocks[-1].influence_after_norm,
            "linears": tuple(linear for block in blocks for linear in block.linears),
            "files": files | self._write(SPECTRA, spectra),
        }

    def _known(self, state: ProfileState, index: int) -> tuple[ProfiledBlock, dict[str, Tensor]]:
        """A finished block; what was warned of and the time that it took count again."""
        block = state.finished[index]
        for message in block.warnings:
            warnings.warn(message, NumericalWarning, stacklevel=2)
        for phase, seconds in block.seconds.items():
            self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds
        return block, state.spectra(index)

    def _take_block(
        self, passed: BlockPass, so_far: dict[str, float]
    ) -> tuple[ProfiledBlock, dict[str, Tensor]]:
        """Solve a block, write its bases, and keep it."""
        spectra: dict[str, Tensor] = {}
        with gathered_warnings() as messages:
            found = self._solve(passed)
        for one in found:
            spectra |= {f"{one.entry.name}.{part}": t for part, t in one.spectra.items()}
        bases = {f"{one.entry.name}.{part}": t for one in found for part, t in one.bases.items()}
        with self.clock.phase("write"):
            name = block_file(passed.index)
            files = self._write(name, bases) if bases else {}
        block = ProfiledBlock(
            index=passed.index,
            linears=tuple(one.entry for one in found),
            influence=passed.influence,
            influence_after_norm=passed.influence_after_norm,
            files=files,
            seconds={k: s - so_far.get(k, 0.0) for k, s in self.clock.seconds.items()},
            warnings=tuple(messages),
        )
        if self.state is not None:
            with self.clock.phase("write"):
                self.state.save(block, spectra)
        return block, spectra

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write a file, if this is the process that does."""
        return write_tensors(self.folder, name, tensors) if processes.is_first() else {}

    def _solve(self, passed: BlockPass) -> list[_Profiled]:
        """Solve the linears of a block; check its moments on tokens, at half of largest ranks."""
        statistics, sites = self.statistics, list(passed.sites)
        moments = passed.moments
        if statistics is not None:
            moments = {site.name: statistics.of(site.name, moments[site.name]) for site in sites}
        with self.clock.phase("solve"):
            found = made_apart(
                sites, lambda site: self._profile(site, moments[site.name]), _pack, self._unpack
            )
        passed.moments.clear()
        moments.clear()
        halves = {name: one.half for name, one in found.items() if one.half is not None}
        gaps = check_block(self.model, passed, halves, self.clock)
        for name, one in found.items():
            one.entry = one.entry.model_copy(update={"token_check": gaps.get(name)})
        return list(found.values())

    def _profile(self, site: LinearSite, moments: Moments) -> _Profiled:
        """Solve one linear for all ranks."""
        statistics, method = self.statistics, self.recipe.make_method()
        rank = self.work.useful_rank(site.shape)
        moments = moments.ridged(self.recipe.relative_ridge())
        gradient = statistics.pop_mean_gradient(site.name) if statistics else None
        solved = solve(self.model, site, rank, method, moments, gradient)
        found = solved.decomposition
        metric = method.metric(moments) if isinstance(method, KFACSVD) else None
        spectra = {
            "changes": solved.changes,
            "singular_values": found.singular_values,
            "measured_losses": found.measured_losses(moments.original, metric),
        }
        entry = ProfiledLinear(
            name=site.name,
            block=site.block,
            kind=module_type(site.name, self.work.anatomy),
            out_features=site.shape.out_features,
            in_features=site.shape.in_features,
            tokens=solved.tokens,
            energy=found.energy,
            jitter=found.jitter,
            stored_rank=0 if self.spectra_only else rank,
            seconds=solved.seconds,
            token_check=None,
            mean_square_gradient=_mean_square(statistics, site.name),
        )
        bases = {"basis": found.basis, "dual": found.dual} if entry.stored_rank else {}
        half = None
        if rank:
            linear = self.model.get_submodule(site.name)
            half = LowRankLinear.from_factors(linear, found.truncate((rank + 1) // 2))
        return _Profiled(entry, _known(spectra), _known(bases), half)

    def _unpack(self, site: LinearSite, text: str, tensors: Mapping[str, Tensor]) -> _Profiled:
        """What another process has profiled."""
        if self.statistics is not None:
            self.statistics.pop_mean_gradient(site.name)
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in PARTS}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(":")
            parts[kind][key] = tensor
        spectra, bases, factors = (parts[kind] for kind in PARTS)
        half = None
        if factors:
            linear = self.model.get_submodule(site.name)
            half = refilled(linear, factors)
        return _Profiled(ProfiledLinear.model_validate_json(text), spectra, bases, half)


def _known(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _pack(one: _Profiled) -> tuple[str, dict[str, Tensor]]:
    factors = factor_tensors(one.half) if one.half else {}
    parts = zip(PARTS, (one.spectra, one.bases, factors), strict=True)
    tensors = {f"{kind}:{key}": t for kind, found in parts for key, t in found.items()}
    return one.entry.model_dump_json(), tensors


def _mean_square(statistics: Statistics | None, name: str) -> float | None:
    has_metric = statistics is not None and (METRIC, name) in statistics.store
    return statistics.mean_square(name) if statistics is not None and has_metric else None


def module_type(name: str, anatomy: Anatomy) -> str:
    """Name of a linear within its block, numbers as ``*``: what it shares a pool of ranks with.

    Examples
    --------
    >>> module_type("model.layers.3.mlp.experts.7.up_proj", Anatomy("model.layers", (), None))
    'mlp.experts.*.up_proj'
    """
    _, *local = name.removeprefix(f"{anatomy.path}.").split(".")
    return ".".join("*" if re.fullmatch(r"\d+", part) else part for part in local)
