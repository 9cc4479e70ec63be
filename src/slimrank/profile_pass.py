"""The pass of a profile: all that every size is made from, block after block, to disk."""

import re
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank.blockwise import BlockPass, check_block, pass_blocks, solve
from slimrank.calibration import METRIC, TokenWindows
from slimrank.checkpoint import ProfiledLinear
from slimrank.checkpoint.profile import SPECTRA, block_file, write_tensors
from slimrank.checkpoint.profile_state import ProfiledBlock, ProfileState
from slimrank.environment import Clock, gathered_warnings
from slimrank.errors import NumericalWarning
from slimrank.linalg import Decomposition
from slimrank.methods import KFACSVD
from slimrank.model import Anatomy
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.statistics import Statistics
from slimrank.targets import Work


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
            "files": files | write_tensors(self.folder, SPECTRA, spectra),
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
            found = self._solve(passed, spectra)
        bases = {
            f"{entry.name}.{part}": columns
            for entry, solved in found
            for part, columns in (("basis", solved.basis), ("dual", solved.dual))
            if entry.stored_rank and columns is not None
        }
        with self.clock.phase("write"):
            name = block_file(passed.index)
            files = write_tensors(self.folder, name, bases) if bases else {}
        block = ProfiledBlock(
            index=passed.index,
            linears=tuple(entry for entry, _ in found),
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

    def _solve(
        self, passed: BlockPass, spectra: dict[str, Tensor]
    ) -> list[tuple[ProfiledLinear, Decomposition]]:
        """Solve the linears of a block; check its moments on tokens, at half of largest ranks."""
        work, statistics, method = self.work, self.statistics, self.recipe.make_method()
        if statistics is not None:
            known = {site.name: passed.moments[site.name] for site in passed.sites}
            passed = replace(passed, moments={n: statistics.of(n, m) for n, m in known.items()})
        found: dict[str, tuple[partial[ProfiledLinear], Decomposition]] = {}
        halves: dict[str, LowRankLinear] = {}
        for site in passed.sites:
            linear = self.model.get_submodule(site.name)
            with self.clock.phase("solve"):
                rank = work.useful_rank(site.shape)
                moments = passed.moments[site.name].ridged(self.recipe.relative_ridge())
                gradient = statistics.pop_mean_gradient(site.name) if statistics else None
                solved = solve(self.model, site, rank, method, moments, gradient)
                decomposition = solved.decomposition
                if solved.changes is not None:
                    spectra[f"{site.name}.changes"] = solved.changes
                spectra[f"{site.name}.singular_values"] = decomposition.singular_values
                metric = method.metric(moments) if isinstance(method, KFACSVD) else None
                spectra[f"{site.name}.measured_losses"] = decomposition.measured_losses(
                    moments.original, metric
                )
                if rank:
                    half = decomposition.truncate((rank + 1) // 2)
                    halves[site.name] = LowRankLinear.from_factors(linear, half)
            entry = partial(
                ProfiledLinear,
                name=site.name,
                block=site.block,
                kind=module_type(site.name, work.anatomy),
                out_features=site.shape.out_features,
                in_features=site.shape.in_features,
                tokens=solved.tokens,
                energy=decomposition.energy,
                jitter=decomposition.jitter,
                stored_rank=0 if self.spectra_only else rank,
                seconds=solved.seconds,
                mean_square_gradient=_mean_square(statistics, site.name),
            )
            found[site.name] = entry, decomposition
        gaps = check_block(self.model, passed, halves, self.clock)
        return [
            (entry(token_check=gaps.get(name)), solved) for name, (entry, solved) in found.items()
        ]


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
