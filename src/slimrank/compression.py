"""The one data flow: anatomy, tokens, ranks, blocks, report, folder."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.blockwise import factorise_blocks
from slimrank.building import Made, build, hold_against
from slimrank.calibration import TokenWindows, hold_out
from slimrank.checkpoint import (
    folder_bytes,
    mark_compressed,
    read_profile,
    require_writable,
    write_folder,
)
from slimrank.drawing import draw
from slimrank.environment import Clock, environment, gathered_warnings, peak_bytes
from slimrank.errors import RecipeError
from slimrank.methods import method_by_name
from slimrank.model import weights_fingerprint
from slimrank.options import CompressionOptions
from slimrank.profiling import ProfiledModel, require_moments, write_profile
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport
from slimrank.search import require_held_out
from slimrank.source import open_dense
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
    with gathered_warnings() as messages:
        done = _factorise(model, recipe, out, tokenizer, windows, profile, options)
    report = done.report.model_copy(update={"warnings": tuple(messages)})
    if out is None:
        return report
    return write_folder(done.model, done.tokenizer, Path(out), report, done.probe)


@dataclass(frozen=True, slots=True)
class _Done:
    """A compressed model in memory, and what is to be written with it."""

    model: Any
    tokenizer: Any
    probe: Tensor
    report: CompressionReport


def _factorise(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    out: str | Path | None,
    tokenizer: Any,
    windows: TokenWindows | None,
    profile: str | Path | None,
    options: CompressionOptions,
) -> _Done:
    """Load, plan, draw, walk the blocks, report: all but writing."""
    clock = Clock()
    if out is None and not isinstance(model, nn.Module):
        raise RecipeError("a model given by its path needs a folder to be written to: out=...")
    opened = None if profile is None else read_profile(profile)
    with clock.phase("load"):
        loaded, name, tokenizer = open_dense(model, recipe.dtype, tokenizer)
    loaded = loaded.to(options.device) if options.device else loaded
    needs_profile = opened is not None or recipe.allocation == "swift"
    source = ProfiledModel(loaded, name, weights_fingerprint(loaded) if needs_profile else "")
    split_alike = opened is not None and opened.manifest.for_kv_cache
    work = find_work(loaded, recipe, split_alike=split_alike)
    with work.put_back_on_error(loaded) if isinstance(model, nn.Module) else nullcontext():
        if opened is not None:
            recipe = hold_against(opened, source, work, recipe, windows, tokenizer)
            made = build(loaded, work, recipe, opened, options, clock)
        elif recipe.allocation == "swift":
            made = _profile_and_build(source, work, recipe, windows, tokenizer, out, options, clock)
        else:
            made = _calibrate_and_build(loaded, work, recipe, windows, tokenizer, options, clock)
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
        allocation=made.allocation,
        kv_cache=work.kv_cache,
        seconds=clock.seconds,
        peak_bytes=peak_bytes(),
        environment=environment(loaded),
        warnings=(),
    )
    probe = torch.arange(PROBE_TOKENS)[None] % num_embeddings(loaded)
    return _Done(loaded, tokenizer, probe if made.probe is None else made.probe[None, :128], report)


def _calibrate_and_build(
    model: Any,
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows | None,
    tokenizer: Any,
    options: CompressionOptions,
    clock: Clock,
) -> Made:
    """Uniform ranks, known beforehand: each block is factorised when the tokens have passed it."""
    method = method_by_name(recipe.method)
    ranks = work.uniform(recipe)
    if method.needs_moments and any(rank is not None for rank in ranks.ranks.values()):
        windows = windows or draw(recipe.calibration, tokenizer, with_held_out=False)
        windows.check_vocabulary(num_embeddings(model))
    else:
        windows = None
    linears = factorise_blocks(model, work.anatomy, ranks, method, windows, options, clock)
    return Made(
        ranks=ranks,
        linears=linears,
        calibration_fingerprint=windows.fingerprint() if windows else "",
        tokens=windows.tokens if windows else 0,
        probe=windows.windows[0] if windows else None,
    )


def _profile_and_build(
    source: ProfiledModel,
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows | None,
    tokenizer: Any,
    out: str | Path | None,
    options: CompressionOptions,
    clock: Clock,
) -> Made:
    """Ranks that need the spectra of all blocks: a profile beside the output, gone afterwards."""
    require_moments(recipe)
    windows = windows or draw(recipe.calibration, tokenizer, with_held_out=True)
    if recipe.swift.importance_weight is None:
        _, held_out = hold_out(windows, recipe.calibration.held_out_sequences)
        require_held_out(held_out, "the calibration text")
    beside = None if out is None else next(p for p in Path(out).absolute().parents if p.exists())
    with TemporaryDirectory(prefix=".slimrank-", dir=beside) as folder:
        path = Path(folder) / "profile"
        opened = write_profile(path, source, work, recipe, windows, options, clock)
        return build(source.model, work, recipe, opened, options, clock)
