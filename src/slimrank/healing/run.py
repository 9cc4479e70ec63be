"""From a compressed folder to a healed one: load, train beside the dense model, write."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from slimrank.calibration import TokenWindows, default_batch_size
from slimrank.checkpoint import (
    UNFINISHED_HEALING,
    HealRun,
    HealState,
    load,
    require_writable,
)
from slimrank.checkpoint.manifest import warn_of_differences
from slimrank.environment import Clock, environment, gathered_warnings, peak_bytes
from slimrank.errors import NumericalWarning
from slimrank.healing.adapters import add_adapters, merge_adapters
from slimrank.healing.distillation import Distillation, HeldOut
from slimrank.healing.opening import Case, open_case
from slimrank.healing.trained import trained_parameters
from slimrank.healing.training import Training
from slimrank.healing.writing import finished, write_healed
from slimrank.options import Track, untracked
from slimrank.recipe import HealRecipe
from slimrank.refine import master_parameters
from slimrank.report import HealCheck, HealReport

PROBE_TOKENS = 128


def heal(
    folder: str | Path,
    out: str | Path,
    recipe: HealRecipe,
    *,
    teacher: str | Path | None = None,
    windows: TokenWindows | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    resume: bool = False,
    track: Track = untracked,
) -> HealReport:
    """Train a compressed folder, end to end, towards the dense model's predictions.

    Trained are both factors and the bias of every factorised linear, and the norms in the blocks
    and behind them; or, with `recipe.lora_rank`, adapters on the factors, which are merged at the
    end. Either way the new folder has the ranks, the layout and the size of the old one. It stops
    where held-out sequences gain no more, and what is written is the best by them: never worse than
    `folder` was there.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank, its factors in floats.
    out : str or Path
        Must not exist.
    recipe : HealRecipe
    teacher : str or Path, optional
        The dense model: a folder, a hub id or a ``.gguf`` file. The one that `folder` was made from
        if left out, and if it is still to be found.
    windows : TokenWindows, optional
        Train on these, and stop by the last of them, instead of the recipe's text.
    device : str, optional
        Where both models run.
    batch_size : int, optional
        Sequences at once; by default about 4,096 tokens. Steps are of `recipe.batch_sequences`.
    resume : bool
        Go on with the run that was cut off while it made `out`, if there is one.
    track : callable
        Wraps the loop over steps, given a description, to show progress.

    Returns
    -------
    HealReport

    Raises
    ------
    RecipeError
        If nothing is factorised, there is no text, or nobody says which model was compressed.
    CheckpointError
        If `folder` is none of ours, damaged, or in eight bits; if `out` exists, an unfinished run
        is in the way or of something else, the disk is full, or what is read back is not what was
        written.
    ModelError, TextError
        If a model or the text cannot be used.
    NumericalError
        If a weight, a loss or a gradient is not finite.
    """
    out = Path(out)
    found = finished(Path(folder), out, recipe) if resume else None
    if found is not None:
        return found
    require_writable(out)
    if not resume:
        UNFINISHED_HEALING.require_none(out)
    with ExitStack() as stack:
        with gathered_warnings() as messages:
            clock = Clock()
            with clock.phase("load"):
                case = open_case(Path(folder), recipe, teacher, windows, device)
            state = stack.enter_context(_kept(out, case, recipe, resume))
            case, report = _train(case, recipe, state, clock, batch_size, track)
        report = report.model_copy(update={"warnings": tuple(messages)})
        probe = case.held_out.windows[0][None, :PROBE_TOKENS]
        passing = state.folder if state.last else None
        report = write_healed(case.student.model, case.contents, out, report, probe, passing)
        state.remove()
    return report


@contextmanager
def _kept(out: Path, case: Case, recipe: HealRecipe, resume: bool) -> Iterator[HealState]:
    """Begin what is kept of the run, or go on with what there is."""
    versions = environment(case.student.model)
    if recipe.lora_rank is not None:
        versions["peft"] = version("peft")
    marks = case.marks(recipe)
    is_resumed = resume and UNFINISHED_HEALING.is_kept(out)
    run = HealRun(marks=marks, versions=versions)
    with HealState.resume(out) if is_resumed else HealState.begin(out, run) as state:
        if is_resumed:
            state.require(marks)
            warn_of_differences("healing", state.manifest.versions, versions)
        yield state


def _train(
    case: Case,
    recipe: HealRecipe,
    state: HealState,
    clock: Clock,
    batch_size: int | None,
    track: Track,
) -> tuple[Case, HealReport]:
    """Train in place, round, and look at the held-out sequences once more."""
    model = case.student.model
    size = batch_size or default_batch_size(max(map(len, case.windows.windows)))
    with clock.phase("teacher"):
        held_out = HeldOut.of(Distillation(case.student, case.teacher), case.held_out, size)
        teacher_perplexity = held_out.teacher_perplexity()
    before, perplexity = held_out.measure()
    start = HealCheck(step=0, tokens=0, seconds=0.0, divergence=before, perplexity=perplexity)
    if recipe.lora_rank is None:
        trained = trained_parameters(case.student)
    else:
        trained = add_adapters(model, recipe.lora_rank, recipe.seed)
    with clock.phase("train"), master_parameters(model, trained, "learning rate"):
        training = Training(held_out, trained, case.text, recipe, size, state)
        checks, kept = training.run(start, track)
    if recipe.lora_rank is not None:
        merge_adapters(model)
    after, perplexity = held_out.measure()
    if after >= before:
        case, kept, after, perplexity = _as_it_was(case), 0, before, start.perplexity
    report = HealReport(
        source=case.contents.folder,
        teacher=case.teacher_name,
        recipe=recipe,
        text_fingerprint=case.windows.fingerprint(),
        tokens=case.text.tokens,
        held_out_tokens=case.held_out.tokens,
        trained_params=sum(parameter.numel() for parameter in trained),
        steps=training.planned,
        checks=checks,
        kept_step=kept,
        divergence=after,
        perplexity=perplexity,
        teacher_perplexity=teacher_perplexity,
        weight_bytes=0,
        seconds=clock.seconds,
        peak_bytes=peak_bytes(),
        environment=environment(model),
    )
    return case, report


def _as_it_was(case: Case) -> Case:
    """The folder's own weights, where training brought nothing once it was rounded."""
    warnings.warn(
        "nothing was better on the held-out sequences than the folder as it was; its weights are "
        "kept. Give more text, or a smaller learning rate",
        NumericalWarning,
        stacklevel=2,
    )
    model = load(case.contents.folder, dtype="auto")
    return replace(case, student=replace(case.student, model=model))
