"""The one data flow: anatomy, tokens, ranks, blocks, report, folder."""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimrank import processes
from slimrank.building import hold_against
from slimrank.calibration import TokenWindows
from slimrank.checkpoint import (
    REPORT,
    UNFINISHED_RUN,
    RunState,
    folder_bytes,
    mark_compressed,
    read_profile,
    read_report,
    removed_what_is_left,
    require_served_by_code,
    require_writable,
    state_folder,
    write_folder,
)
from slimrank.environment import environment, gathered_warnings, peak_bytes
from slimrank.errors import RecipeError
from slimrank.job import Job
from slimrank.keeping import keeps_blocks
from slimrank.making import make
from slimrank.model import weights_fingerprint
from slimrank.options import CompressionOptions
from slimrank.profiling import ProfiledModel
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport
from slimrank.source import open_dense, parse_source
from slimrank.targets import find_work, probe_ids, require_streamable


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

    Processes that torchrun has started, or that have joined a group of ``torch.distributed``, share
    the work if all of them call this alike. The first one writes, and all get its report.

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
        Go on with the run that was cut off while it made `out`, if there is one. Runs that look at
        text, and streamed ones, keep what is finished in a folder beside `out`.

    Returns
    -------
    CompressionReport

    Raises
    ------
    SlimrankError
        `RecipeError`, `BudgetError`, `TextError`, `ModelError`, `NumericalError`, `ProcessError` or
        `CheckpointError` (also for a profile of something else); then nothing is written, and a
        model in memory is as it was (unless only the writing failed: then it is compressed).

    Examples
    --------
    >>> import torch
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
    processes.join()
    options = options or CompressionOptions()
    options = replace(options, device=processes.own_device(options.device))
    if out is not None:
        if resume and not isinstance(model, nn.Module):
            found = _finished(Path(out), parse_source(model).name, recipe, profile)
            if found is not None:
                return found
        if processes.is_first():
            require_writable(Path(out))
    with ExitStack() as stack:
        with gathered_warnings() as messages:
            job = Job(recipe, out, tokenizer, windows, options, resume, stack)
            done = _factorise(model, job, profile)
        report = done.report.model_copy(update={"warnings": tuple(messages)})
        report = report if out is None else _write(done, report, Path(out), options.remote_code)
    if processes.count() == 1:
        return report
    return CompressionReport.model_validate_json(processes.hand_round(report.model_dump_json())[0])


def _write(
    done: "_Done", report: CompressionReport, out: Path, remote_code: bool
) -> CompressionReport:
    """Write the folder; let go of what was kept of the run."""
    processes.wait()  # until nobody reads what was kept
    if processes.is_first():
        passing = done.state.folder if done.state else None
        report = write_folder(
            done.model, done.tokenizer, out, report, done.probe, passing, remote_code
        )
        if done.state is not None:
            done.state.remove()
    return report


def _finished(
    out: Path, name: str, recipe: CompressionRecipe, profile: str | Path | None
) -> CompressionReport | None:
    """Report of a run that was cut off when only the removal of its state was left to do."""
    if not processes.agreed(state_folder(out).is_dir() and (out / REPORT).is_file()):
        return None
    report = read_report(out)
    if profile is not None:  # it says what the text was
        calibration = read_profile(profile).manifest.calibration
        recipe = recipe.model_copy(update={"calibration": calibration})
    if (report.model, report.recipe_fingerprint) != (name, recipe.fingerprint()):
        return None
    is_first = processes.is_first()
    is_removed = is_first and removed_what_is_left(out, report.recipe_fingerprint)
    return report if processes.agreed(is_removed) else None


@dataclass(frozen=True, slots=True)
class _Done:
    """A compressed model in memory, and what is to be written with it."""

    model: Any
    tokenizer: Any
    probe: Tensor
    report: CompressionReport
    state: RunState | None


def _is_kept(job: Job, from_profile: bool) -> bool:
    """Whether finished blocks are kept; see that no others are in the way."""
    is_kept = keeps_blocks(job.recipe, from_profile=from_profile, stream=job.options.stream)
    if job.resume and job.out is None:
        raise RecipeError("only a run that writes a folder can be resumed: out=...")
    if job.resume and not is_kept:
        what = "a run from a profile" if from_profile else f"{job.recipe.method} with these ranks"
        raise RecipeError(
            f"{what} looks at no text, is short and keeps nothing to go on with; leave --resume out"
        )
    if job.out is not None and not job.resume and processes.is_first():
        UNFINISHED_RUN.require_none(Path(job.out))
    return is_kept and job.out is not None


def _require_same(job: Job, source: ProfiledModel) -> None:
    """See that all processes that share a run were given the same."""
    if processes.count() > 1:
        marks = {
            "model": source.fingerprint,
            "recipe": job.recipe.fingerprint(),
            "text": job.windows.fingerprint() if job.windows else "",
            "output": str(job.out),
            "choice of how to run": str((job.options.batch_size, job.options.stream, job.resume)),
        }
        processes.require_same(marks)


def _factorise(model: str | Path | nn.Module, job: Job, profile: str | Path | None) -> _Done:
    """Load, plan, draw, walk the blocks, report: all but writing."""
    if job.out is None and not isinstance(model, nn.Module):
        raise RecipeError("a model given by its path needs a folder to be written to: out=...")
    is_kept = _is_kept(job, from_profile=profile is not None)
    require_streamable(job.recipe, job.options)
    if profile is not None and not job.recipe.is_of_text_alone:
        raise RecipeError(
            "a profile is of one pass, and two are asked for; leave --profile out, or say "
            "--passes 1"
            if job.recipe.passes == 2
            else "a profile is of its text alone, and sequences are to be generated; leave "
            "--profile out, or say --generate 0"
        )
    opened = None if profile is None else read_profile(profile)
    with job.clock.phase("load"):
        loaded, name, tokenizer = open_dense(
            model, job.recipe.dtype, job.tokenizer, job.options.stream, job.options.device
        )
    job = replace(job, tokenizer=tokenizer)
    recipe = job.recipe
    told_apart = opened is not None or recipe.allocation != "uniform" or is_kept
    told_apart |= processes.count() > 1
    source = ProfiledModel(loaded, name, weights_fingerprint(loaded) if told_apart else "")
    _require_same(job, source)
    split_alike = opened is not None and opened.manifest.for_kv_cache
    work = find_work(loaded, recipe, split_alike=split_alike)
    with work.put_back_on_error(loaded) if isinstance(model, nn.Module) else nullcontext():
        if job.options.remote_code:
            require_served_by_code(loaded)
        if opened is not None:
            recipe = hold_against(opened, source, work, recipe, job.windows, tokenizer)
            job = replace(job, recipe=recipe)
        made = make(source, work, job, opened)
        size = work.size(made.ranks, folder_bytes(loaded, aligned=True))
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
        tuning=made.tuning,
        allocation=made.allocation,
        kv_cache=work.kv_cache,
        seconds=job.clock.seconds,
        peak_bytes=peak_bytes(),
        environment=environment(loaded),
        warnings=(),
    )
    probe = probe_ids(loaded) if made.probe is None else made.probe[None, :128]
    return _Done(loaded, tokenizer, probe, report, made.state)
