"""The one data flow: anatomy, tokens, ranks, blocks, report, folder."""

import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.allocation import RankPlan
from slimrank.blockwise import factorise_blocks
from slimrank.building import Made, build, choose_ranks, hold_against
from slimrank.calibration import (
    ActivationStore,
    TokenWindows,
    default_batch_size,
    embed_streams,
    hold_out,
)
from slimrank.checkpoint import (
    Profile,
    RunManifest,
    RunState,
    folder_bytes,
    has_run,
    mark_compressed,
    read_profile,
    require_no_run,
    require_writable,
    write_folder,
)
from slimrank.drawing import draw
from slimrank.environment import Clock, environment, gathered_warnings, peak_bytes
from slimrank.errors import NumericalWarning, RecipeError
from slimrank.methods import STREAMS
from slimrank.model import weights_fingerprint
from slimrank.options import CompressionOptions
from slimrank.profiling import ProfiledModel, write_profile
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport
from slimrank.search import require_held_out
from slimrank.sequential import factorise_in_sequence
from slimrank.source import open_dense
from slimrank.statistics import Statistics, collect_statistics
from slimrank.targets import PROBE_TOKENS, Work, find_work, num_embeddings


def compress(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    windows: TokenWindows | None = None,
    profile: str | Path | None = None,
    options: CompressionOptions | None = None,
    resume: bool = False,
) -> CompressionReport:
    """Make a causal language model smaller by activation-aware low-rank factorisation.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id or a ``.gguf`` file; or a model, which is then compressed in place.
    recipe : CompressionRecipe
        What to do.
    out : str or Path, optional
        Folder to write; must not exist. Needed unless `model` is a model in memory.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory: tokenizes the calibration text, and is saved beside the model.
    windows : TokenWindows, optional
        Calibrate on these instead of the recipe's text.
    profile : str or Path, optional
        A profile of this very model (see `slimrank.profile`): nothing is calibrated then.
    options : CompressionOptions, optional
        How to run.
    resume : bool
        Go on with the run that was cut off while it made `out`, if there is one. Only sequential
        runs keep what is finished, in a folder beside `out`.

    Returns
    -------
    CompressionReport

    Raises
    ------
    SlimrankError
        `RecipeError`, `BudgetError`, `TextError`, `ModelError`, `NumericalError` or
        `CheckpointError` (also for a profile of something else); then nothing is written, and a
        model in memory is as it was (unless only the writing failed: then it is compressed).

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> ids = torch.randint(64, (512,), generator=torch.Generator().manual_seed(0))
    >>> report = compress(model, CompressionRecipe(budget={"param_ratio": 0.5}),
    ...     windows=TokenWindows(tuple(ids.split(128))))
    >>> report.size.target_params <= 0.5 * report.size.target_params_before
    True
    """
    options = options or CompressionOptions()
    if out is not None:
        require_writable(Path(out))
    with ExitStack() as stack:
        with gathered_warnings() as messages:
            job = _Job(recipe, out, tokenizer, windows, options, resume, stack)
            done = _factorise(model, job, profile)
        report = done.report.model_copy(update={"warnings": tuple(messages)})
        if out is None:
            return report
        report = write_folder(done.model, done.tokenizer, Path(out), report, done.probe)
        if done.state is not None:
            done.state.remove()
    return report


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be done, beside the model; `stack` closes what stays open to the end."""

    recipe: CompressionRecipe
    out: str | Path | None
    tokenizer: Any
    windows: TokenWindows | None
    options: CompressionOptions
    resume: bool
    stack: ExitStack
    clock: Clock = field(default_factory=Clock)

    @property
    def beside(self) -> Path | None:
        """Where passing files go: next to the output."""
        if self.out is None:
            return None
        return next(p for p in Path(self.out).absolute().parents if p.exists())

    def drawn(self) -> "_Job":
        """The same with its windows, the held-out ones last: text is read and tokenized once."""
        calibration = self.recipe.calibration
        windows = self.windows or draw(calibration, self.tokenizer, with_held_out=True)
        return replace(self, windows=windows)

    def held_apart(self) -> tuple[TokenWindows, TokenWindows | None]:
        """Windows to calibrate on, and those that are held out."""
        windows = self.drawn().windows
        assert windows is not None
        return hold_out(windows, self.recipe.calibration.held_out_sequences)


@dataclass(frozen=True, slots=True)
class _Done:
    """A compressed model in memory, and what is to be written with it."""

    model: Any
    tokenizer: Any
    probe: Tensor
    report: CompressionReport
    state: RunState | None


def _factorise(model: str | Path | nn.Module, job: _Job, profile: str | Path | None) -> _Done:
    """Load, plan, draw, walk the blocks, report: all but writing."""
    if job.out is None and not isinstance(model, nn.Module):
        raise RecipeError("a model given by its path needs a folder to be written to: out=...")
    if job.resume and not (job.recipe.is_sequential and job.out is not None):
        raise RecipeError("only a sequential run that writes a folder can be resumed")
    if job.recipe.is_sequential and job.out is not None and not job.resume:
        require_no_run(Path(job.out))
    opened = None if profile is None else read_profile(profile)
    with job.clock.phase("load"):
        loaded, name, tokenizer = open_dense(model, job.recipe.dtype, job.tokenizer)
    loaded = loaded.to(job.options.device) if job.options.device else loaded
    job = replace(job, tokenizer=tokenizer)
    recipe = job.recipe
    is_kept = recipe.is_sequential and job.out is not None
    told_apart = opened is not None or recipe.allocation != "uniform" or is_kept
    source = ProfiledModel(loaded, name, weights_fingerprint(loaded) if told_apart else "")
    split_alike = opened is not None and opened.manifest.for_kv_cache
    work = find_work(loaded, recipe, split_alike=split_alike)
    with work.put_back_on_error(loaded) if isinstance(model, nn.Module) else nullcontext():
        if opened is not None:
            recipe = hold_against(opened, source, work, recipe, job.windows, tokenizer)
            job = replace(job, recipe=recipe)
        made = _make(source, work, job, opened)
        size = work.size(made.ranks, folder_bytes(loaded))
        mark_compressed(loaded, work.attentions if work.kv_cache else None)
    report = CompressionReport(
        model=name,
        recipe=recipe,
        recipe_fingerprint=recipe.fingerprint(),
        calibration_fingerprint=made.calibration_fingerprint,
        tokens=made.tokens,
        size=size,
        linears=tuple(made.linears),
        blocks=made.blocks,
        allocation=made.allocation,
        kv_cache=work.kv_cache,
        seconds=job.clock.seconds,
        peak_bytes=peak_bytes(),
        environment=environment(loaded),
        warnings=(),
    )
    probe = torch.arange(PROBE_TOKENS)[None] % num_embeddings(loaded)
    probe = probe if made.probe is None else made.probe[None, :128]
    return _Done(loaded, tokenizer, probe, report, made.state)


def _make(source: ProfiledModel, work: Work, job: _Job, opened: Profile | None) -> Made:
    """Choose ranks and replace the linears, by the shortest way that the recipe leaves."""
    recipe, options, clock = job.recipe, job.options, job.clock
    is_built = recipe.for_profile() == recipe and not recipe.is_sequential
    if opened is not None and not is_built and recipe.allocation == "uniform":
        raise RecipeError(
            f"nothing of the profile would be used: {recipe.method} in this order is not made from "
            "one, and uniform ranks need none; leave --profile out, or say --allocation swift"
        )
    if recipe.is_sequential:
        return _make_in_sequence(source, work, job, opened)
    statistics = None
    if opened is None and recipe.allocation != "uniform":
        job = job.drawn()
        if not is_built:
            statistics = _statistics(source, work, job, recipe.needs, job.held_apart()[0])
        opened = _passing_profile(source, work, job, statistics, spectra_only=not is_built)
    if opened is not None and is_built:
        return build(source.model, work, recipe, opened, options, clock)
    ranks, allocation = choose_ranks(source.model, work, recipe, opened, options, clock)
    windows = None
    if recipe.make_method().needs and any(rank is not None for rank in ranks.ranks.values()):
        # Where ranks come from a profile, what it held out stays held out.
        windows = job.windows or draw(recipe.calibration, job.tokenizer, with_held_out=False)
        windows = job.held_apart()[0] if opened is not None else windows
        windows.check_vocabulary(num_embeddings(source.model))
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


def _statistics(
    source: ProfiledModel, work: Work, job: _Job, needs: frozenset[str], windows: TokenWindows
) -> Statistics | None:
    """What is needed of the original model beside moments, of these windows; kept to the end."""
    store = job.stack.enter_context(ActivationStore(job.options.memory, job.beside))
    windows.check_vocabulary(num_embeddings(source.model))
    return collect_statistics(
        source.model, work.anatomy, needs, job.recipe, windows, job.options, job.clock, store
    )


def _passing_profile(
    source: ProfiledModel,
    work: Work,
    job: _Job,
    statistics: Statistics | None = None,
    spectra_only: bool = False,
) -> Profile:
    """Profile for ranks that need the spectra of all blocks; beside the output, gone at the end."""
    recipe, windows = job.recipe.for_profile(), job.drawn().windows
    assert windows is not None
    if recipe.allocation == "swift" and recipe.swift.importance_weight is None:
        _, held_out = hold_out(windows, recipe.calibration.held_out_sequences)
        require_held_out(held_out, "the calibration text")
    passing = TemporaryDirectory(prefix=".slimrank-", dir=job.beside)
    path = Path(job.stack.enter_context(passing)) / "profile"
    spectra_only &= recipe.allocation == "global"  # the search of 'swift' makes models
    return write_profile(
        path,
        source,
        work,
        recipe,
        windows,
        job.options,
        job.clock,
        spectra_only,
        statistics=statistics,
    )


def _make_in_sequence(source: ProfiledModel, work: Work, job: _Job, opened: Profile | None) -> Made:
    """Take the blocks one after the other; go on where a run was cut off."""
    job = job.drawn()
    model, recipe, clock = source.model, job.recipe, job.clock
    calibration, held_out = job.held_apart()
    drawn = TokenWindows((*calibration.windows, *(held_out.windows if held_out else ())))
    marks: dict[str, Any] = {
        "recipe_fingerprint": recipe.fingerprint(),
        "model_fingerprint": source.fingerprint,
        "calibration_fingerprint": drawn.fingerprint(),
        "dtype": environment(model)["dtype"],
    }
    drawn.check_vocabulary(num_embeddings(model))
    is_resumed = job.resume and job.out is not None and has_run(Path(job.out))
    ranks_are_known = is_resumed or opened is not None
    needs = recipe.needs_beside_ranks if ranks_are_known else recipe.needs
    statistics = _statistics(source, work, job, needs, calibration)
    state = None
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
        ranks, allocation = RankPlan(state.manifest.ranks), state.manifest.allocation
    else:
        if opened is None and recipe.allocation != "uniform":
            opened = _passing_profile(source, work, job, statistics, spectra_only=True)
        ranks, allocation = choose_ranks(model, work, recipe, opened, job.options, clock)
        if job.out is not None:
            manifest = RunManifest(
                **marks, versions=environment(model), ranks=dict(ranks.ranks), allocation=allocation
            )
            state = job.stack.enter_context(RunState.begin(Path(job.out), manifest))
    store = job.stack.enter_context(ActivationStore(job.options.memory, job.beside))
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
