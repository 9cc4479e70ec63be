"""One pass over a model, kept on disk: every size is then made from it without calibration."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from slimrank import processes
from slimrank.calibration import ActivationStore, TokenWindows, hold_out
from slimrank.checkpoint import (
    Profile,
    ProfileManifest,
    read_profile,
    renamed_when_done,
    require_space,
    require_writable,
    state_folder,
)
from slimrank.checkpoint.manifest import warn_of_differences
from slimrank.checkpoint.profile import HELD_OUT, write_manifest, write_tensors
from slimrank.checkpoint.profile import MANIFEST as PROFILE
from slimrank.checkpoint.profile_state import (
    UNFINISHED_PROFILE,
    ProfileRun,
    ProfileState,
    removed_what_is_left,
)
from slimrank.drawing import draw
from slimrank.environment import Clock, environment, gathered_warnings, peak_bytes
from slimrank.errors import RecipeError
from slimrank.methods import STREAMS
from slimrank.model import weights_fingerprint
from slimrank.options import CompressionOptions
from slimrank.planning import profile_bytes
from slimrank.profile_pass import ProfilePass
from slimrank.recipe import BudgetRecipe, CompressionRecipe, RefineRecipe, SwiftRecipe
from slimrank.source import open_dense, parse_source
from slimrank.statistics import Statistics, collect_statistics
from slimrank.targets import Work, find_work, num_embeddings


def profile(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    out: str | Path,
    *,
    tokenizer: Any = None,
    windows: TokenWindows | None = None,
    for_kv_cache: bool = False,
    spectra_only: bool = False,
    options: CompressionOptions | None = None,
    resume: bool = False,
) -> Profile:
    """Take the original activations through a model once, and keep what every size is made from.

    Every block that is finished is kept in a folder beside `out` until the profile stands.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id or a ``.gguf`` file; or a model, which is left as it is.
    recipe : CompressionRecipe
        Its method, targets, calibration and dtype; the budget is not looked at, and of the
        allocation only whether it needs gradients.
    out : str or Path
        Folder to write; must not exist.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    windows : TokenWindows, optional
        Calibrate on these; the last ones are held out.
    for_kv_cache : bool
        Keep the whole bases of keys and values, and split fused projections: what a key/value cache
        of latents may ask for. Done anyway if the recipe has a `kv_cache`.
    spectra_only : bool
        Keep no bases: enough to analyse, a few megabytes even for the largest models.
    options : CompressionOptions, optional
    resume : bool
        Go on with the profile that was cut off while it made `out`, if there is one: tokens only
        pass the blocks that are finished. Gradients, where the recipe needs them, are taken anew.

    Returns
    -------
    Profile

    Raises
    ------
    SlimrankError
        As `slimrank.compress`; `out` is then not written. Also if the disk has no room, or an
        unfinished profile is in the way, is damaged, or was begun with something else.

    References
    ----------
    Swift-SVD (arXiv 2604.01609), algorithm 1 and section 3: one eigendecomposition for all ratios.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> ids = torch.randint(64, (512,), generator=torch.Generator().manual_seed(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = profile(model, CompressionRecipe(budget={"param_ratio": 0.5}),
    ...         f"{folder}/profile", windows=TokenWindows(tuple(ids.split(64))))
    >>> len(found.manifest.linears), len(found.manifest.importance)
    (14, 2)
    """
    options, out, clock = options or CompressionOptions(), Path(out), Clock()
    require_moments(recipe)
    processes.join()
    with ExitStack() as stack:
        if resume and (found := _finished(out, model, recipe, windows, for_kv_cache, spectra_only)):
            return found
        if processes.is_first():
            require_writable(out)
        if processes.is_first() and not resume:
            UNFINISHED_PROFILE.require_none(out)
        device = processes.own_device(options.device)
        with clock.phase("load"):
            loaded, name, tokenizer = open_dense(
                model, recipe.dtype, tokenizer, options.stream, device
            )
        source = ProfiledModel(loaded, name, weights_fingerprint(loaded))
        with gathered_warnings() as warned:
            work = find_work(loaded, recipe, for_kv_cache)
            stack.enter_context(work.put_back_after(loaded))
            windows = windows or draw(recipe.calibration, tokenizer, with_held_out=True)
            state = _begin_or_resume(
                out, source, work, recipe, windows, spectra_only, resume, stack
            )
        return write_profile(
            out, source, work, recipe, windows, options, clock, spectra_only, warned, state=state
        )


def _finished(
    out: Path,
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    windows: TokenWindows | None,
    for_kv_cache: bool,
    spectra_only: bool,
) -> Profile | None:
    """Profile of a run that was cut off when only the removal of its state was left to do.

    None if there is none, or what is told of it without a model shows that it is another.
    """
    if not processes.agreed(state_folder(out).is_dir() and (out / PROFILE).is_file()):
        return None
    found = read_profile(out)
    manifest, held_out = found.manifest, found.held_out()
    pairs = [
        (manifest.method, recipe.method),
        (manifest.ridge, recipe.relative_ridge()),
        (manifest.settings, recipe.method_settings()),
        (manifest.calibration, recipe.calibration),
        (manifest.for_kv_cache, for_kv_cache or recipe.kv_cache is not None),
        (not any(linear.stored_rank for linear in manifest.linears), spectra_only),
    ]
    if isinstance(model, nn.Module):
        pairs.append((manifest.model_fingerprint, weights_fingerprint(model)))
    else:
        pairs.append((manifest.model, parse_source(model).name))
    if recipe.dtype != "auto" and not isinstance(model, nn.Module):
        pairs.append((manifest.dtype, recipe.dtype))
    if windows is not None:
        own, others = hold_out(windows, recipe.calibration.held_out_sequences)
        pairs.append((manifest.calibration_fingerprint, own.fingerprint()))
        given = others.fingerprint() if others else ""
        pairs.append((held_out.fingerprint() if held_out else "", given))
    is_same = all(one == other for one, other in pairs)
    fingerprint = served_alike(recipe).fingerprint()
    is_removed = processes.is_first() and is_same and removed_what_is_left(out, fingerprint)
    return found if processes.agreed(is_removed) else None


def served_alike(recipe: CompressionRecipe) -> CompressionRecipe:
    """The same with what a profile does not depend on at its default, so that all sizes share one.

    Examples
    --------
    >>> one, other = (CompressionRecipe(budget={"param_ratio": x}) for x in (0.8, 0.6))
    >>> served_alike(one) == served_alike(other)
    True
    """
    plain: dict[str, Any] = {
        "budget": BudgetRecipe(param_ratio=1.0),
        "within_block": "fixed",
        "order": None,
        "refine": RefineRecipe(),
        "tune": None,
    }
    if recipe.allocation == "swift":
        plain |= {"allocation": "uniform", "swift": SwiftRecipe()}
    return recipe.model_copy(update=plain)


def _begin_or_resume(
    out: Path,
    source: "ProfiledModel",
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows,
    spectra_only: bool,
    resume: bool,
    stack: ExitStack,
) -> ProfileState:
    """Open what keeps the finished blocks; see that it is of this very profile."""
    versions = environment(source.model)
    marks = {
        "recipe": served_alike(recipe).fingerprint(),
        "model": source.fingerprint,
        "calibration text": windows.fingerprint(),
        "dtype": versions["dtype"],
        "choice of --kv": "yes" if work.attentions else "no",
        "choice of --spectra-only": "yes" if spectra_only else "no",
    }
    processes.require_same({**marks, "output": str(out)})
    if not processes.agreed(resume and UNFINISHED_PROFILE.is_kept(out)):
        begun = ProfileState.begin(out, ProfileRun(marks=marks, versions=versions))
        return stack.enter_context(begun)
    state = stack.enter_context(ProfileState.resume(out))
    state.require(marks)
    warn_of_differences("profile", state.manifest.versions, versions)
    return state


def require_moments(recipe: CompressionRecipe) -> None:
    """See that the method is of what one pass over a model shows.

    Raises
    ------
    RecipeError
        If it looks at no activations, or at those of a model that is partly compressed.
    """
    method = recipe.make_method()
    if not method.needs & STREAMS:
        raise RecipeError(
            f"{recipe.method} looks at no moments of activations: there is nothing to profile"
        )
    if "shifted" in method.needs:
        raise RecipeError(
            f"{recipe.method} looks at what arrives in the compressed model, which a profile does "
            "not know; a profile by swift-svd serves it for allocation 'swift'"
        )


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """A dense model, its name, and its fingerprint before any projection was split."""

    model: Any
    name: str
    fingerprint: str


def write_profile(
    out: Path,
    source: ProfiledModel,
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows,
    options: CompressionOptions,
    clock: Clock,
    spectra_only: bool = False,
    warned: Sequence[str] = (),
    statistics: Statistics | None = None,
    state: ProfileState | None = None,
) -> Profile:
    """Profile the targeted linears of an open model into a folder (see `profile`).

    Parameters
    ----------
    out : Path
    source : ProfiledModel
    work : Work
    recipe : CompressionRecipe
    windows : TokenWindows
        The last ones are held out.
    options : CompressionOptions
    clock : Clock
    spectra_only : bool
    warned : sequence of str
        Warnings given before, which belong to the profile.
    statistics : Statistics, optional
        Of these windows, if they are known already.
    state : ProfileState, optional
        Keeps each finished block of `out`. Without it, all of the work is one step.

    Raises
    ------
    CheckpointError
        If the disk has no room.
    """
    model = source.model
    kept = state.bytes_kept if state else 0
    if processes.is_first():
        require_space(out, profile_bytes(model, work, recipe, spectra_only) - kept)
    windows.check_vocabulary(num_embeddings(model))
    windows, held_out = hold_out(windows, recipe.calibration.held_out_sequences)
    with ExitStack() as stack:
        folder, writes = out, processes.is_first()
        if writes:
            whole = state.renamed_when_done() if state else renamed_when_done(out)
            folder = stack.enter_context(whole)
        stack.enter_context(processes.until_all_are_done())
        beside = (
            state.folder if state else out.parent
        )  # what a killed process spills is found there
        with gathered_warnings() as messages:
            store = stack.enter_context(ActivationStore(options.memory, beside))
            statistics = statistics or collect_statistics(
                model, work.anatomy, recipe.needs, recipe, windows, options, clock, store
            )
            store = statistics.store if statistics else store  # one limit for all of it
            found = ProfilePass(
                folder, model, work, recipe, clock, store, spectra_only, statistics, state
            ).take(windows, options)
        if held_out is not None:
            tokens = {str(number): window for number, window in enumerate(held_out.windows)}
            found["files"] |= write_tensors(folder, HELD_OUT, tokens) if writes else {}
        manifest = ProfileManifest(
            model=source.name,
            model_fingerprint=source.fingerprint,
            method=recipe.method,
            ridge=recipe.relative_ridge(),
            settings=recipe.method_settings(),
            dtype=environment(model)["dtype"],
            for_kv_cache=bool(work.attentions),
            calibration=recipe.calibration,
            calibration_fingerprint=windows.fingerprint(),
            held_out_fingerprint=held_out.fingerprint() if held_out else "",
            tokens=windows.tokens,
            seconds=clock.seconds,
            peak_bytes=peak_bytes(),
            environment=environment(model),
            warnings=tuple(dict.fromkeys((*warned, *messages))),
            **found,
        )
        if writes:
            write_manifest(folder, manifest)
    processes.wait()
    return read_profile(out)
