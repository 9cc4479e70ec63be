"""From an open model to its factors: what the recipe needs, by the shortest way that it leaves."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter
from torch import Tensor

from slimrank import processes
from slimrank.allocation import RankPlan
from slimrank.blockwise import factorise_blocks
from slimrank.building import Made, build, choose_ranks
from slimrank.calibration import (
    ActivationStore,
    TokenWindows,
    default_batch_size,
    embed_streams,
    generate_windows,
)
from slimrank.checkpoint import Profile
from slimrank.drawing import draw
from slimrank.environment import gathered_warnings
from slimrank.errors import CheckpointError, RecipeError
from slimrank.job import Job
from slimrank.keeping import finished_profile, unfinished_profile, warn_again
from slimrank.methods import STREAMS
from slimrank.model import copy_of
from slimrank.profiling import ProfiledModel, write_profile
from slimrank.report import LinearReport, RanksReport
from slimrank.search import require_held_out
from slimrank.second_look import look_again
from slimrank.sequential import factorise_in_sequence
from slimrank.statistics import Statistics, collect_statistics
from slimrank.targets import Work, num_embeddings
from slimrank.tuning import Tuning

CHOSEN: TypeAdapter[tuple[dict[str, int | None], RanksReport | None]] = TypeAdapter(
    tuple[dict[str, int | None], RanksReport | None]
)


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
    is_simple = recipe.is_of_text_alone and recipe.tune is None
    job = replace(job, always_holds_out=not is_simple)
    job = job.kept(source.model, source.fingerprint, opened)
    if is_simple:
        return _make(source, work, job, opened)
    job = job.drawn()
    if recipe.generated_sequences:
        job = replace(job, generated=_generated(source, job))
    tuning = None
    if recipe.tune is not None:
        calibration, held_out = job.held_apart()
        job.all_windows().check_vocabulary(num_embeddings(source.model))
        with clock.phase("predictions"):
            tuning = Tuning.prepare(
                source.model, work.anatomy, calibration, held_out, job.options, job.store()
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
    found: dict[str, Tensor] = {}
    with job.clock.phase("generate"):
        if processes.is_first():  # one generator draws all of them
            written = generate_windows(
                source.model,
                text,
                recipe.generated_sequences,
                recipe.calibration.seed,
                job.options.batch_size,
                job.options.track,
            )
            found = {str(number): window for number, window in enumerate(written.windows)}
        _, found = processes.hand_round(tensors=found)
    windows = TokenWindows(tuple(found.values()))
    if job.state is not None:
        job.state.settle_generated(windows.fingerprint())
    return windows.windows


def _make(
    source: ProfiledModel,
    work: Work,
    job: Job,
    opened: Profile | None,
    statistics: Statistics | None = None,
) -> Made:
    """Make it by the shortest way; statistics are taken here where they are not known."""
    recipe = job.recipe
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    if opened is not None and not is_built and recipe.allocation == "uniform":
        raise RecipeError(
            f"nothing of the profile would be used: {recipe.method} in this order is not made from "
            "one, and uniform ranks need none; leave --profile out, or say --allocation swift"
        )
    if recipe.is_sequential:
        return _make_in_sequence(source, work, job, opened, statistics)
    holds_out = opened is not None or recipe.allocation != "uniform" or job.always_holds_out
    chooses = opened is None and recipe.allocation != "uniform"
    job = job.drawn() if chooses else job
    if chooses and not is_built and statistics is None:
        needs = recipe.needs_beside_ranks if _known_ranks(job) else recipe.needs
        statistics = _statistics(source, work, job, needs, job.held_apart()[0])
    ranks, allocation, opened = _choose(
        source, work, job, opened, statistics, spectra_only=not is_built
    )
    if opened is not None and is_built:
        held_out = opened.held_out()
        return Made(
            ranks=ranks,
            linears=build(source.model, work, ranks, opened, job.options, job.clock, job.state),
            calibration_fingerprint=opened.manifest.calibration_fingerprint,
            tokens=opened.manifest.tokens,
            probe=held_out.windows[0] if held_out else None,
            allocation=allocation,
            state=job.state,
        )
    linears, windows = _factorise(source, work, job, ranks, statistics, holds_out=holds_out)
    return Made(
        ranks=ranks,
        linears=linears,
        calibration_fingerprint=windows.fingerprint() if windows else "",
        tokens=windows.tokens if windows else 0,
        probe=windows.windows[0] if windows else None,
        allocation=allocation,
        state=job.state,
    )


def _factorise(
    source: ProfiledModel,
    work: Work,
    job: Job,
    ranks: RankPlan,
    statistics: Statistics | None,
    holds_out: bool,
) -> tuple[list[LinearReport], TokenWindows | None]:
    """Solve for known ranks, block after block, from moments of the windows that are given too."""
    recipe, method, windows = job.recipe, job.recipe.make_method(), None
    if method.needs and any(rank is not None for rank in ranks.ranks.values()):
        # What ranks, a first pass or training are not to see stays held out.
        windows = job.windows or draw(recipe.calibration, job.tokenizer, with_held_out=False)
        windows = job.held_apart()[0] if holds_out else windows
        statistics = statistics or _statistics(
            source, work, job, recipe.needs_beside_ranks, windows
        )
    linears = factorise_blocks(
        source.model,
        work.anatomy,
        ranks,
        method,
        recipe.relative_ridge(),
        windows if method.needs & STREAMS else None,
        job.options,
        job.clock,
        statistics.store if statistics else job.store(),  # one limit for all of it
        statistics if method.needs else None,
        job.state,
    )
    return linears, windows


def _known_ranks(job: Job) -> RankPlan | None:
    """Ranks of the run that is gone on with, if they had been chosen."""
    ranks = None if job.state is None else job.state.manifest.ranks
    return None if ranks is None else RankPlan(ranks)


def _choose(
    source: ProfiledModel,
    work: Work,
    job: Job,
    opened: Profile | None,
    statistics: Statistics | None,
    spectra_only: bool,
) -> tuple[RankPlan, RanksReport | None, Profile | None]:
    """Ranks, how they were chosen, and the profile that they were chosen from; each once a run.

    Whoever makes nothing else from that profile wants the `spectra_only`.
    """
    recipe, state, ranks = job.recipe, job.state, _known_ranks(job)
    takes_profile = opened is None and recipe.allocation != "uniform"
    if state is not None and ranks is not None:
        warn_again(state.manifest.warnings)
        if takes_profile and not spectra_only:
            opened = finished_profile(state)
            if opened is None:
                raise CheckpointError(f"{state.profile} is missing; delete {state.folder}")
        return ranks, state.manifest.allocation, opened
    with gathered_warnings() as messages:
        if takes_profile:
            opened = _passing_profile(source, work, job, statistics, spectra_only)
        ranks, allocation = _chosen(source, work, job, opened)
    if state is not None:
        state.settle(ranks.ranks, allocation, messages)
        if spectra_only:
            state.drop_profile()
    return ranks, allocation, opened


def _chosen(
    source: ProfiledModel, work: Work, job: Job, opened: Profile | None
) -> tuple[RankPlan, RanksReport | None]:
    """Ranks that the first process chooses: a search may go another way on another machine."""
    text = ""
    if processes.is_first():
        ranks, allocation = choose_ranks(
            source.model, work, job.recipe, opened, job.options, job.clock
        )
        if processes.count() == 1:
            return ranks, allocation
        text = CHOSEN.dump_json((dict(ranks.ranks), allocation)).decode()
    found, allocation = CHOSEN.validate_json(processes.hand_round(text)[0])
    return RankPlan(found), allocation


def _look_twice(source: ProfiledModel, work: Work, job: Job) -> Statistics:
    """Statistics of the original model and of what a first pass makes of it, as if of one text."""
    recipe, windows = job.recipe, job.held_apart()[0]
    first = _statistics(source, work, job, recipe.needs, windows)
    first = first or Statistics(job.store(), windows.tokens)
    with ExitStack() as stack:  # the first profile is gone before the second is made
        copied = replace(source, model=copy_of(source.model))
        once = replace(job, recipe=recipe.first_pass(), stack=stack, state=None)
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
        source.model, work.anatomy, needs, job.recipe, windows, job.options, job.clock, job.store()
    )


def _passing_profile(
    source: ProfiledModel,
    work: Work,
    job: Job,
    statistics: Statistics | None = None,
    spectra_only: bool = False,
) -> Profile:
    """Profile for ranks that need the spectra of all blocks; beside the output, gone at the end.

    Where the run is kept, so is the profile, block by block.
    """
    recipe, (_, held_out) = job.recipe.for_profile(), job.held_apart()
    if recipe.allocation == "swift" and recipe.swift.importance_weight is None:
        require_held_out(held_out, "the calibration text")
    parted = {"held_out_sequences": len(held_out.windows) if held_out else 0}
    sample = recipe.calibration.model_copy(update=parted)
    state = None
    if job.state is None:
        passing = TemporaryDirectory(prefix=".slimrank-", dir=job.beside)
        own = job.stack.enter_context(passing)
        job.stack.enter_context(processes.until_all_are_done())
        path = Path(processes.hand_round(own)[0]) / "profile"
        if not path.parent.is_dir():
            raise CheckpointError(
                "processes on several machines need an output on a disk that all of them see: out="
            )
    else:
        path = job.state.profile
        if (known := finished_profile(job.state)) is not None:
            warn_again(known.manifest.warnings)
            return known
        state = job.stack.enter_context(unfinished_profile(job.state))
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
        state=state,
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
    ranks_are_known = _known_ranks(job) is not None or opened is not None
    needs = recipe.needs_beside_ranks if ranks_are_known else recipe.needs
    statistics = statistics or _statistics(source, work, job, needs, calibration)
    ranks, allocation, _ = _choose(source, work, job, opened, statistics, spectra_only=True)
    store = job.store()
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
        job.state,
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
        state=job.state,
    )
