"""From an open model to its factors: what the recipe needs, by the shortest way that it leaves."""

import copy
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from slimrank.allocation import RankPlan
from slimrank.blockwise import factorise_blocks
from slimrank.building import Made, build, choose_ranks
from slimrank.calibration import (
    ActivationStore,
    TokenWindows,
    default_batch_size,
    embed_streams,
    generate_windows,
    hold_out,
)
from slimrank.checkpoint import Profile, RunManifest, RunState, has_run
from slimrank.drawing import draw
from slimrank.environment import Clock, environment
from slimrank.errors import NumericalWarning, RecipeError
from slimrank.methods import STREAMS
from slimrank.options import CompressionOptions
from slimrank.profiling import ProfiledModel, write_profile
from slimrank.recipe import CompressionRecipe
from slimrank.report import RanksReport
from slimrank.search import require_held_out
from slimrank.second_look import look_again
from slimrank.sequential import factorise_in_sequence
from slimrank.statistics import Statistics, collect_statistics
from slimrank.targets import Work, num_embeddings
from slimrank.tuning import Tuning


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, beside the model; `stack` closes what stays open to the end.

    Parameters
    ----------
    recipe : CompressionRecipe
    out : str, Path or None
        Folder that will be written.
    tokenizer : PreTrainedTokenizerBase or None
    windows : TokenWindows or None
        The recipe's text is drawn from if None.
    options : CompressionOptions
    resume : bool
    stack : ExitStack
    clock : Clock
    always_holds_out : bool
        Also in a run that has nothing to choose by, and would calibrate on all windows it is given.
    generated : tuple of Tensor
        Windows that the model wrote itself, to calibrate on too.
    """

    recipe: CompressionRecipe
    out: str | Path | None
    tokenizer: Any
    windows: TokenWindows | None
    options: CompressionOptions
    resume: bool
    stack: ExitStack
    clock: Clock = field(default_factory=Clock)
    always_holds_out: bool = False
    generated: tuple[Tensor, ...] = ()

    @property
    def beside(self) -> Path | None:
        """Where passing files go: next to the output."""
        if self.out is None:
            return None
        return next(p for p in Path(self.out).absolute().parents if p.exists())

    def drawn(self) -> "Job":
        """The same with its windows, the held-out ones last: text is read and tokenized once."""
        calibration = self.recipe.calibration
        windows = self.windows or draw(calibration, self.tokenizer, with_held_out=True)
        return replace(self, windows=windows)

    def held_apart(self) -> tuple[TokenWindows, TokenWindows | None]:
        """Windows to calibrate on, and those that are held out."""
        windows = self.drawn().windows
        assert windows is not None
        own, held_out = hold_out(windows, self.recipe.calibration.held_out_sequences)
        return TokenWindows((*own.windows, *self.generated)), held_out

    def all_windows(self) -> TokenWindows:
        """Both of these as one: windows to calibrate on, and behind them those that are held out.

        Examples
        --------
        >>> import torch
        >>> recipe = CompressionRecipe.from_dict(
        ...     {"budget": {"param_ratio": 0.5}, "calibration": {"held_out_sequences": 1}})
        >>> text = TokenWindows((torch.tensor([1]), torch.tensor([2])))
        >>> job = Job(recipe, None, None, text, CompressionOptions(), False, ExitStack(),
        ...     generated=(torch.tensor([3]),))
        >>> [window.item() for window in job.all_windows().windows]
        [1, 3, 2]
        """
        calibration, held_out = self.held_apart()
        return TokenWindows((*calibration.windows, *(held_out.windows if held_out else ())))


def make(source: ProfiledModel, work: Work, job: Job, opened: Profile | None) -> Made:
    """Choose ranks and replace the linears.

    Parameters
    ----------
    source : ProfiledModel
        Its model is changed.
    work : Work
    job : Job
    opened : Profile or None
        A profile that the user gave.

    Raises
    ------
    SlimrankError
        As `slimrank.compress`.
    """
    recipe, clock = job.recipe, job.clock
    if recipe.is_of_text_alone and recipe.tune is None:
        return _make(source, work, job, opened)
    job = replace(job.drawn(), always_holds_out=True)
    if recipe.generated_sequences:
        job = replace(job, generated=_generated(source, job))
    tuning = None
    if recipe.tune is not None:
        calibration, held_out = job.held_apart()
        job.all_windows().check_vocabulary(num_embeddings(source.model))
        with clock.phase("predictions"):
            tuning = Tuning.prepare(
                source.model, work.anatomy, calibration, held_out, job.options, _store(job)
            )
    statistics = _look_twice(source, work, job) if recipe.passes == 2 else None
    made = _make(source, work, job, opened, statistics)
    if tuning is None or recipe.tune is None:
        return made
    with clock.phase("tune"):
        report = tuning.tune(source.model, work.anatomy, recipe.tune)
    return replace(made, tuning=report)


def _generated(source: ProfiledModel, job: Job) -> tuple[Tensor, ...]:
    """What the original model goes on with, from places of the calibration text."""
    recipe, (text, _) = job.recipe, job.held_apart()
    text.check_vocabulary(num_embeddings(source.model))
    with job.clock.phase("generate"):
        return generate_windows(
            source.model,
            text,
            recipe.generated_sequences,
            recipe.calibration.seed,
            job.options.batch_size,
            job.options.track,
        ).windows


def _make(
    source: ProfiledModel,
    work: Work,
    job: Job,
    opened: Profile | None,
    statistics: Statistics | None = None,
) -> Made:
    """Make it by the shortest way; statistics are taken here where they are not known."""
    recipe, options, clock = job.recipe, job.options, job.clock
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    if opened is not None and not is_built and recipe.allocation == "uniform":
        raise RecipeError(
            f"nothing of the profile would be used: {recipe.method} in this order is not made from "
            "one, and uniform ranks need none; leave --profile out, or say --allocation swift"
        )
    if recipe.is_sequential:
        return _make_in_sequence(source, work, job, opened, statistics)
    if opened is None and recipe.allocation != "uniform":
        job = job.drawn()
        if not is_built and statistics is None:
            statistics = _statistics(source, work, job, recipe.needs, job.held_apart()[0])
        opened = _passing_profile(source, work, job, statistics, spectra_only=not is_built)
    if opened is not None and is_built:
        return build(source.model, work, recipe, opened, options, clock)
    ranks, allocation = choose_ranks(source.model, work, recipe, opened, options, clock)
    windows = None
    if recipe.make_method().needs and any(rank is not None for rank in ranks.ranks.values()):
        # What ranks, a first pass or training are not to see stays held out.
        is_held_apart = opened is not None or job.always_holds_out
        windows = job.windows or draw(recipe.calibration, job.tokenizer, with_held_out=False)
        windows = job.held_apart()[0] if is_held_apart else windows
        statistics = statistics or _statistics(
            source, work, job, recipe.needs_beside_ranks, windows
        )
    linears = factorise_blocks(
        source.model,
        work.anatomy,
        ranks,
        recipe.make_method(),
        recipe.relative_ridge(),
        windows if recipe.make_method().needs & STREAMS else None,
        options,
        clock,
        statistics,
    )
    return Made(
        ranks=ranks,
        linears=linears,
        calibration_fingerprint=windows.fingerprint() if windows else "",
        tokens=windows.tokens if windows else 0,
        probe=windows.windows[0] if windows else None,
        allocation=allocation,
    )


def _look_twice(source: ProfiledModel, work: Work, job: Job) -> Statistics:
    """Statistics of the original model and of what a first pass makes of it, as if of one text."""
    recipe, windows = job.recipe, job.held_apart()[0]
    first = _statistics(source, work, job, recipe.needs, windows)
    first = first or Statistics(_store(job), windows.tokens)
    with ExitStack() as stack:  # the first profile is gone before the second is made
        copied = replace(source, model=copy.deepcopy(source.model))
        once = replace(job, recipe=recipe.first_pass(), stack=stack, resume=False)
        _make(copied, work, once, None, first)
    with job.clock.phase("second look"), ActivationStore(job.options.memory, job.beside) as passing:
        return look_again(copied.model, work.anatomy, recipe, windows, job.options, first, passing)


def _statistics(
    source: ProfiledModel, work: Work, job: Job, needs: frozenset[str], windows: TokenWindows
) -> Statistics | None:
    """What is needed of the original model beside moments, of these windows; kept to the end.

    The windows are held against its vocabulary first.
    """
    windows.check_vocabulary(num_embeddings(source.model))
    return collect_statistics(
        source.model, work.anatomy, needs, job.recipe, windows, job.options, job.clock, _store(job)
    )


def _store(job: Job) -> ActivationStore:
    """What is kept to the end, on disk past what the options allow."""
    return job.stack.enter_context(ActivationStore(job.options.memory, job.beside))


def _passing_profile(
    source: ProfiledModel,
    work: Work,
    job: Job,
    statistics: Statistics | None = None,
    spectra_only: bool = False,
) -> Profile:
    """Profile for ranks that need the spectra of all blocks; beside the output, gone at the end."""
    recipe, (_, held_out) = job.recipe.for_profile(), job.held_apart()
    if recipe.allocation == "swift" and recipe.swift.importance_weight is None:
        require_held_out(held_out, "the calibration text")
    parted = {"held_out_sequences": len(held_out.windows) if held_out else 0}
    sample = recipe.calibration.model_copy(update=parted)
    passing = TemporaryDirectory(prefix=".slimrank-", dir=job.beside)
    path = Path(job.stack.enter_context(passing)) / "profile"
    spectra_only &= recipe.allocation != "swift"  # the search of that one makes models
    return write_profile(
        path,
        source,
        work,
        recipe.model_copy(update={"calibration": sample}),
        job.all_windows(),
        job.options,
        job.clock,
        spectra_only,
        statistics=statistics,
    )


def _make_in_sequence(
    source: ProfiledModel,
    work: Work,
    job: Job,
    opened: Profile | None,
    statistics: Statistics | None,
) -> Made:
    """Take the blocks one after the other; go on where a run was cut off."""
    job = job.drawn()
    model, recipe, clock = source.model, job.recipe, job.clock
    calibration, held_out = job.held_apart()
    job.all_windows().check_vocabulary(num_embeddings(model))
    is_resumed = job.resume and job.out is not None and has_run(Path(job.out))
    ranks_are_known = is_resumed or opened is not None
    needs = recipe.needs_beside_ranks if ranks_are_known else recipe.needs
    statistics = statistics or _statistics(source, work, job, needs, calibration)
    ranks, allocation, state = _begin_or_resume(
        source, work, job, opened, statistics, is_resumed=is_resumed
    )
    store = _store(job)
    length = max(len(window) for window in calibration.windows)
    size = job.options.batch_size or default_batch_size(length)
    with clock.phase("embed"):
        streams = embed_streams(model, work.anatomy, calibration, held_out, size, store)
    walk = factorise_in_sequence(
        model,
        work.anatomy,
        ranks,
        work.fixed,
        recipe,
        streams,
        job.options,
        clock,
        state,
        statistics,
    )
    return Made(
        ranks=walk.ranks,
        linears=list(walk.linears.values()),
        calibration_fingerprint=calibration.fingerprint(),
        tokens=calibration.tokens,
        probe=calibration.windows[0],
        allocation=allocation,
        blocks=tuple(walk.blocks),
        state=state,
    )


def _begin_or_resume(
    source: ProfiledModel,
    work: Work,
    job: Job,
    opened: Profile | None,
    statistics: Statistics | None,
    is_resumed: bool,
) -> tuple[RankPlan, RanksReport | None, RunState | None]:
    """Ranks, how they were chosen, and what keeps finished blocks if a folder is to be written."""
    model, recipe = source.model, job.recipe
    marks: dict[str, Any] = {
        "recipe_fingerprint": recipe.fingerprint(),
        "model_fingerprint": source.fingerprint,
        "calibration_fingerprint": job.all_windows().fingerprint(),
        "dtype": environment(model)["dtype"],
    }
    if is_resumed and job.out is not None:
        state = job.stack.enter_context(RunState.resume(Path(job.out)))
        state.require(**marks)
        for difference in state.manifest.differences(environment(model)):
            warnings.warn(
                f"the run was begun with another {difference}; its bits may differ from those of "
                "an unbroken run",
                NumericalWarning,
                stacklevel=2,
            )
        return RankPlan(state.manifest.ranks), state.manifest.allocation, state
    if opened is None and recipe.allocation != "uniform":
        opened = _passing_profile(source, work, job, statistics, spectra_only=True)
    ranks, allocation = choose_ranks(model, work, recipe, opened, job.options, job.clock)
    if job.out is None:
        return ranks, allocation, None
    manifest = RunManifest(
        **marks, versions=environment(model), ranks=dict(ranks.ranks), allocation=allocation
    )
    state = job.stack.enter_context(RunState.begin(Path(job.out), manifest))
    return ranks, allocation, state
