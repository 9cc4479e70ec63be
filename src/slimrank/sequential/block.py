"""One block in its turn: moments of what arrives, solves, swaps, training, errors."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from slimrank import processes
from slimrank.allocation import RankPlan, greedy
from slimrank.apart import made_apart
from slimrank.blockwise import (
    Replacement,
    Solved,
    joint_gaps,
    replacements_apart,
    solve,
    truncate,
)
from slimrank.calibration import (
    SHIFTED,
    BlockPair,
    OriginalPass,
    RestOfModel,
    Streams,
    call_levels,
    output_sensitivity,
    pass_level,
    pass_original,
    pass_shifted,
    stacked,
)
from slimrank.environment import Clock, peak_bytes
from slimrank.linalg import Moments, float64_device
from slimrank.methods import STREAMS, Method
from slimrank.model import InputGroup, LinearSite, device_of, replace_linear
from slimrank.recipe import CompressionRecipe
from slimrank.refine import refine_block
from slimrank.report import BlockReport
from slimrank.sequential.last_tokens import LastTokens
from slimrank.sequential.sequence_data import SequenceData
from slimrank.sequential.walked import Walk
from slimrank.statistics import Statistics

Pair = tuple[Moments, Moments]  # over all tokens, over the last sequence


@dataclass(frozen=True, slots=True)
class BlockInTurn:
    """One block, while it is compressed.

    Parameters
    ----------
    model : PreTrainedModel
        Its linears are replaced in it.
    index : int
    path : str
        Dotted name of the block.
    groups : sequence of InputGroup
        Of the linears that are factorised.
    recipe : CompressionRecipe
    streams : Streams
        In front of the block.
    walk : Walk
        Gets the ranks and reports.
    clock : Clock
        Of this block alone.
    statistics : Statistics or None
        What else method and refinement look at.
    rest : RestOfModel or None
        What stands behind the block, for a refinement by predictions.
    """

    model: Any
    index: int
    path: str
    groups: Sequence[InputGroup]
    recipe: CompressionRecipe
    streams: Streams
    walk: Walk
    clock: Clock
    statistics: Statistics | None = None
    rest: RestOfModel | None = None

    @property
    def sites(self) -> Iterator[LinearSite]:
        """Linears of the block, in call order."""
        return (site for group in self.groups for site in group.sites)

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return device_of(self.model.get_submodule(self.path))

    def compress(self, fixed: Mapping[str, int]) -> None:
        """Solve group after group, then train.

        Parameters
        ----------
        fixed : mapping of str to int
            Ranks that may not be shared out anew.

        Raises
        ------
        NumericalError
            If a weight or an activation is not finite, or a moment does not fit its tokens.
        """
        module = self.model.get_submodule(self.path)
        pair = BlockPair(self.index, self.path, copy.deepcopy(module), module)
        method = self.recipe.make_method()
        needs = method.needs & STREAMS
        with self.clock.phase("original"):
            shown = pass_original(pair, self.groups, needs, self.streams)
        known = {name: sums.results() for name, sums in shown.sums.items()}
        if self.recipe.within_block == "greedy" and self.groups:
            self._share_out(pair, method, shown, known, fixed)
        solved: list[str] = []
        names = [site.name for site in self.sites]
        for level in call_levels(self.path, self.groups):
            found = known
            if "shifted" in method.needs:
                pending = [name for name in names if name not in solved]
                with self.clock.phase("shifted"):
                    sums = pass_level(pair, level, solved, pending, needs, self.streams)
                found = {name: group_sums.results() for name, group_sums in sums.items()}
            for group in level:
                self._replace(group, method, shown, found.get(group.sites[0].name))
                solved += [site.name for site in group.sites]
        self._finish(pair, solved)

    def _finish(self, pair: BlockPair, solved: Sequence[str]) -> None:
        """Measure, train, and measure again."""
        with self.clock.phase("shifted"):
            before = pass_shifted(pair, solved, self.streams)
        after, refinement = before, None
        if self.recipe.refines and solved:
            held_out = SequenceData(pair, self.streams, is_held_out=True)
            with self.clock.phase("refine"):
                refinement = refine_block(
                    pair.compressed,
                    SequenceData(pair, self.streams),
                    held_out if held_out.num_sequences else None,
                    self.recipe.refine,
                    self.index,
                    self._output_metric(),
                    self.rest,
                )
            with self.clock.phase("shifted"):
                after = pass_shifted(pair, (), self.streams)
        report = BlockReport(
            index=self.index,
            name=self.path,
            calibration=after[0],
            held_out=after[1],
            unrefined_calibration=before[0] if refinement else None,
            unrefined_held_out=before[1] if refinement else None,
            refinement=refinement,
            seconds=self.clock.seconds,
            peak_bytes=peak_bytes(),
        )
        self.walk.blocks.append(report)

    def _output_metric(self) -> Tensor | None:
        if self.recipe.refine.loss != "gradient" or self.statistics is None:
            return None
        return self.statistics.output_metric(self.index).to(self.device)

    def _replace(
        self, group: InputGroup, method: Method, shown: OriginalPass, moments: Pair | None
    ) -> None:
        """Solve the linears of a group, hold them against tokens, and replace them."""
        split: Literal["orthonormal", "balanced"]
        split = "balanced" if self.recipe.refines else "orthonormal"

        def make(site: LinearSite) -> Replacement:
            rank = self.walk.ranks.ranks[site.name]
            assert rank is not None
            solved = self._solve(site, rank, method, shown, moments)
            return truncate(self.model, site, rank, solved, method, split)

        with self.clock.phase("solve"):
            made = replacements_apart(self.model, group.sites, make)
        gaps: dict[str, float] = {}
        if moments is not None:
            with self.clock.phase("check"):
                gaps = self._gaps(group, method, moments[1], made)
        for name, (layer, report) in made.items():
            self.walk.linears[name] = report.model_copy(update={"token_check": gaps.get(name)})
            replace_linear(self.model, name, layer)

    def _gaps(
        self, group: InputGroup, method: Method, moments: Moments, made: Mapping[str, Replacement]
    ) -> dict[str, float]:
        """Hold the layers of a group against the last own tokens, where they saw any."""
        gaps: dict[str, float] = {}
        if moments.tokens:
            last = LastTokens.of(group, method, self.streams, moments, self.device)
            for name, (layer, _) in made.items():
                weight = self.model.get_submodule(name).weight
                gaps[name] = last.check(name, weight, layer, method)
        return joint_gaps(gaps, list(made))

    def _solve(
        self,
        site: LinearSite,
        columns: int,
        method: Method,
        shown: OriginalPass,
        moments: Pair | None,
    ) -> Solved:
        total = None
        if moments is not None:
            total = replace(moments[0], output_energy=shown.energies.get(site.name))
        total = self.statistics.of(site.name, total) if self.statistics else total
        total = total.ridged(self.recipe.relative_ridge()) if total else None
        return solve(self.model, site, columns, method, total)

    def _share_out(
        self,
        pair: BlockPair,
        method: Method,
        shown: OriginalPass,
        known: Mapping[str, Pair],
        fixed: Mapping[str, int],
    ) -> None:
        """Share the parameters of the block out by what each rank spares its output.

        AA-SVD says that no allocation can know what compression upstream will do; here it is known.
        The spectra are those of the block with nothing in it replaced yet.
        """
        if "shifted" in method.needs:
            with self.clock.phase("shifted"):
                sums = pass_level(pair, self.groups, (), (), method.needs & STREAMS, self.streams)
            known = {name: group_sums.results() for name, group_sums in sums.items()}
        spectra: dict[str, Tensor] = {}
        with self.clock.phase("solve"):
            for group in self.groups:
                moments = known.get(group.sites[0].name)
                spectra |= made_apart(
                    group.sites,
                    partial(self._spectrum, method=method, shown=shown, moments=moments),
                    lambda spectrum: ("", {"spectrum": spectrum}),
                    lambda _site, _text, tensors: tensors["spectrum"].to(
                        float64_device(self.device)
                    ),
                )
        with self.clock.phase("sensitivity"):
            gains = self._gains(pair)
        ranks, shapes = self.walk.ranks.ranks, [site.shape for site in self.sites]
        budget = self.recipe.budget.budget()
        shared = greedy(
            shapes,
            spectra,
            gains,
            sum(shape.params(ranks[shape.name]) for shape in shapes),
            multiple_of=budget.multiple_of,
            min_rank=budget.min_rank,
            fixed={name: rank for name, rank in fixed.items() if name in spectra},
        )
        self.walk.ranks = RankPlan({**ranks, **shared})

    def _spectrum(
        self, site: LinearSite, method: Method, shown: OriginalPass, moments: Pair | None
    ) -> Tensor:
        return self._solve(site, 1, method, shown, moments).decomposition.singular_values

    def _gains(self, pair: BlockPair) -> dict[str, float]:
        """Gains from the linears to the block's output, on the first calibration sequences."""
        streams, names = self.streams, [site.name for site in self.sites]
        seed = (self.recipe.calibration.seed * 1_000_003 + self.index) % 2**63
        linears = {name: self.model.get_submodule(name) for name in names}

        def gains(numbers: list[int], row: tuple[int, int] | None = None) -> dict[str, float]:
            return output_sensitivity(
                pair.compressed,
                linears,
                stacked(streams.store, (SHIFTED,), numbers).to(self.device),
                streams.call(self.index, numbers),
                torch.Generator().manual_seed(seed),
                row=row,
            )

        if processes.count() == 1:
            return gains(next(streams.groups(streams.calibration)))
        lengths = streams.all_lengths
        alike = [place for place, length in enumerate(lengths) if length == lengths[0]]
        alike = alike[: streams.size]
        own = [place for place in alike if place in map(streams.place, streams.calibration)]
        found = [gains(streams.own([p]), (alike.index(p), len(alike))) for p in own]
        totals = processes.sums(len(own), *(sum(one[name] for one in found) for name in names))
        return {name: total / totals[0] for name, total in zip(names, totals[1:], strict=True)}
