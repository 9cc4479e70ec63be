"""Block after block from what the compressed blocks before give: two streams, solves, training."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from slimrank.allocation import RankPlan, greedy
from slimrank.blockwise import Solved, dense_report, solve, truncate
from slimrank.calibration import (
    ARRIVED,
    INPUT,
    SHIFTED,
    TARGET,
    TOKEN_CHECK,
    BlockPair,
    OriginalPass,
    Streams,
    call_levels,
    output_sensitivity,
    pass_level,
    pass_original,
    pass_shifted,
    stacked,
    step_forward,
)
from slimrank.checkpoint import RunState
from slimrank.environment import Clock, gathered_warnings, peak_bytes
from slimrank.errors import CheckpointError, NumericalError, NumericalWarning
from slimrank.linalg import Moments
from slimrank.methods import Method
from slimrank.model import Anatomy, InputGroup, LinearSite, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.recipe import CompressionRecipe
from slimrank.refine import MicroBatch, refine_block
from slimrank.report import BlockReport, LinearReport

Pair = tuple[Moments, Moments]  # over all tokens, over the last sequence


@dataclass(slots=True)
class Walk:
    """What a walk over the blocks has come to.

    Parameters
    ----------
    ranks : RankPlan
        As built; shared out anew within each block if the recipe says so.
    linears : dict of str to LinearReport
        Of all targeted linears, in call order.
    blocks : list of BlockReport
    """

    ranks: RankPlan
    linears: dict[str, LinearReport]
    blocks: list[BlockReport] = field(default_factory=list)


def factorise_in_sequence(
    model: Any,
    anatomy: Anatomy,
    ranks: RankPlan,
    fixed: Mapping[str, int],
    recipe: CompressionRecipe,
    streams: Streams,
    options: CompressionOptions,
    clock: Clock,
    state: RunState | None = None,
) -> Walk:
    """Compress the blocks in order, each from what arrives once those before it are compressed.

    Parameters
    ----------
    model : PreTrainedModel
        Its blocks are changed one after the other.
    anatomy : Anatomy
        Of the targeted linears.
    ranks : RankPlan
    fixed : mapping of str to int
        Ranks that may not be shared out anew.
    recipe : CompressionRecipe
    streams : Streams
        In front of the first block.
    options : CompressionOptions
    clock : Clock
    state : RunState, optional
        Keeps each finished block on disk. Those it holds already are taken from it: both streams
        only pass through them.

    Raises
    ------
    NumericalError
        If a weight or an activation is not finite, or a moment does not fit its tokens.
    CheckpointError
        If the state is damaged, or the disk is full.

    References
    ----------
    AA-SVD (arXiv 2604.02119), algorithm 2.
    """
    walk = Walk(ranks, {site.name: dense_report(site) for site in anatomy.sites})
    factored = anatomy.only(name for name, rank in ranks.ranks.items() if rank is not None)
    for index in options.track(range(len(factored.groups)), "compressing"):
        path = f"{anatomy.path}.{index}"
        if state is not None and index < len(state.finished):
            with clock.phase("resume"):
                _resume_block(model, index, path, state, streams, walk)
            continue
        block = _Block(model, index, path, factored.groups[index], recipe, streams, walk, Clock())
        with gathered_warnings() as messages:
            block.compress(fixed)
        for phase, seconds in block.clock.seconds.items():
            clock.seconds[phase] = clock.seconds.get(phase, 0.0) + seconds
        if state is not None:
            with clock.phase("write"):
                tensors = model.get_submodule(path).state_dict()
                reports = [walk.linears[site.name] for site in block.sites]
                state.save(index, tensors, reports, walk.blocks[-1], messages)
        step_forward(streams)
    return walk


@dataclass(frozen=True, slots=True)
class _Block:
    """One block, while it is compressed."""

    model: Any
    index: int
    path: str
    groups: Sequence[InputGroup]
    recipe: CompressionRecipe
    streams: Streams
    walk: Walk
    clock: Clock

    @property
    def sites(self) -> Iterator[LinearSite]:
        return (site for group in self.groups for site in group.sites)

    def compress(self, fixed: Mapping[str, int]) -> None:
        """Solve group after group, then train."""
        module = self.model.get_submodule(self.path)
        pair = BlockPair(self.index, self.path, copy.deepcopy(module), module)
        method = self.recipe.make_method()
        with self.clock.phase("original"):
            shown = pass_original(pair, self.groups, method.needs, self.streams)
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
                    sums = pass_level(pair, level, solved, pending, method.needs, self.streams)
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
            held_out = _Data(pair, self.streams, self.streams.held_out)
            with self.clock.phase("refine"):
                refinement = refine_block(
                    pair.compressed,
                    _Data(pair, self.streams, self.streams.calibration),
                    held_out if self.streams.held_out else None,
                    self.recipe.refine,
                    self.index,
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

    def _replace(
        self, group: InputGroup, method: Method, shown: OriginalPass, moments: Pair | None
    ) -> None:
        """Solve the linears of a group, hold them against tokens, and replace them."""
        split: Literal["orthonormal", "balanced"]
        split = "balanced" if self.recipe.refines else "orthonormal"
        for site in group.sites:
            rank = self.walk.ranks.ranks[site.name]
            assert rank is not None
            with self.clock.phase("solve"):
                solved = self._solve(site, rank, method, shown, moments)
                layer, report = truncate(self.model, site, rank, solved, method, split)
            with self.clock.phase("check"):
                gap = self._check(site, group, method, layer, moments)
            self.walk.linears[site.name] = report.model_copy(update={"token_check": gap})
            replace_linear(self.model, site.name, layer)

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
            total = total.ridged(self.recipe.relative_ridge())
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
                sums = pass_level(pair, self.groups, (), (), method.needs, self.streams)
            known = {name: group_sums.results() for name, group_sums in sums.items()}
        spectra: dict[str, Tensor] = {}
        with self.clock.phase("solve"):
            for group in self.groups:
                for site in group.sites:
                    found = self._solve(site, 1, method, shown, known.get(group.sites[0].name))
                    spectra[site.name] = found.decomposition.singular_values
        numbers = next(self.streams.groups(self.streams.calibration))
        device = next(pair.compressed.parameters()).device
        seed = self.recipe.calibration.seed * 1_000_003 + self.index
        with self.clock.phase("sensitivity"):
            gains = output_sensitivity(
                pair.compressed,
                {site.name: self.model.get_submodule(site.name) for site in self.sites},
                stacked(self.streams.store, (SHIFTED,), numbers).to(device),
                self.streams.call(self.index, numbers),
                torch.Generator().manual_seed(seed % 2**63),
            )
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

    def _check(
        self,
        site: LinearSite,
        group: InputGroup,
        method: Method,
        layer: LowRankLinear,
        moments: Pair | None,
    ) -> float | None:
        """Hold the moments of the last sequence against its tokens (see `check_on_tokens`)."""
        key, store = group.sites[0].name, self.streams.store
        last = self.streams.num_calibration - 1
        if moments is None or moments[1].tokens == 0:
            return None
        weight = self.model.get_submodule(site.name).weight.detach()
        rows = [
            store.get((kind, key, last)).to(weight.device, torch.float32).flatten(0, -2)
            for kind, stream in ((INPUT, "original"), (ARRIVED, "shifted"))
            if stream in method.needs
        ]
        original, arriving = rows[0], rows[-1]
        anchor = getattr(method, "anchor", 1.0)
        outputs = original @ weight.float().mT
        wanted = outputs + (1 - anchor) * ((arriving - original) @ weight.float().mT)
        factors = layer.factors()
        given = arriving @ factors.right.float().mT @ factors.left.float().mT
        seen, energy, wanted_energy = (
            float(x.double().square().sum()) / len(x) for x in (wanted - given, outputs, wanted)
        )
        known = replace(moments[1], output_energy=energy)
        expected = method.loss(weight, factors, known)
        least = 1e-6 * wanted_energy
        if known.drift is not None:  # then the loss is a difference of energies, known to 1e-7
            arrived = (arriving @ weight.float().mT).double().square().sum()
            least = 1e-4 * (wanted_energy + float(arrived) / len(arriving))
        gap = abs(seen - expected) / max(seen, least, torch.finfo().tiny)
        if not gap <= TOKEN_CHECK:
            raise NumericalError(
                f"{site.name}: the error on the tokens of a sequence is {seen:.6g}, but their "
                f"moments say {expected:.6g}; please report this model"
            )
        return gap


@dataclass(frozen=True, slots=True)
class _Data:
    """Shifted inputs and original outputs of some sequences (see `slimrank.refine.BlockData`)."""

    pair: BlockPair
    streams: Streams
    sequences: range

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    def micro_batches(self, sequences: Sequence[int]) -> Iterator[MicroBatch]:
        device = next(self.pair.compressed.parameters()).device
        store = self.streams.store
        for numbers in self.streams.groups(self.sequences[number] for number in sequences):
            yield MicroBatch(
                inputs=stacked(store, (SHIFTED,), numbers).to(device),
                targets=stacked(store, (TARGET,), numbers).to(device),
                call=self.streams.call(self.pair.index, numbers),
            )


def _resume_block(
    model: Any, index: int, path: str, state: RunState, streams: Streams, walk: Walk
) -> None:
    """Take a block from disk, and both streams through it."""
    module = model.get_submodule(path)
    pair = BlockPair(index, path, copy.deepcopy(module), module)
    pass_original(pair, (), frozenset(), streams)
    finished = state.finished[index]
    for report in finished.linears:
        if report.rank is not None:
            linear = model.get_submodule(report.name)
            layer = LowRankLinear(
                linear.in_features,
                linear.out_features,
                report.rank,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            replace_linear(model, report.name, layer.requires_grad_(linear.weight.requires_grad))
    try:
        module.load_state_dict(state.load(index))
    except RuntimeError as error:
        raise CheckpointError(
            f"block {index} of the unfinished run does not fit: {error}"
        ) from error
    pass_shifted(pair, (), streams)
    walk.linears |= {report.name: report for report in finished.linears}
    walk.ranks = RankPlan({**walk.ranks.ranks, **{r.name: r.rank for r in finished.linears}})
    walk.blocks.append(finished.block)
    for message in finished.warnings:
        warnings.warn(message, NumericalWarning, stacklevel=2)
    step_forward(streams)
