"""The one data flow: anatomy, tokens, ranks, blocks, report, folder."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimrank.blockwise import factorise_blocks
from slimrank.calibration import TokenWindows, draw_windows, read_text
from slimrank.checkpoint import mark_compressed, require_writable, write_folder
from slimrank.environment import Clock, environment, peak_bytes
from slimrank.errors import RecipeError, SlimrankWarning
from slimrank.methods import method_by_name
from slimrank.model import Anatomy, replace_linear
from slimrank.options import CompressionOptions
from slimrank.planning import PROBE_TOKENS, allocate, num_embeddings, planned_size
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport
from slimrank.source import (
    load_model,
    load_tokenizer,
    parse_source,
    require_dense,
    require_finite_weights,
    tokenize,
)


def compress(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    windows: TokenWindows | None = None,
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
    options : CompressionOptions, optional
        How to run.

    Returns
    -------
    CompressionReport

    Raises
    ------
    SlimrankError
        `RecipeError`, `BudgetError`, `TextError`, `ModelError`, `NumericalError` or
        `CheckpointError`; then nothing is written, and a model in memory is as it was (unless only
        the writing failed: then it is compressed).

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
    with _gathered_warnings() as messages:
        done = _factorise(model, recipe, out, tokenizer, windows, options)
    report = done.report.model_copy(update={"warnings": tuple(messages)})
    if out is None:
        return report
    probe = torch.arange(PROBE_TOKENS)[None] % num_embeddings(done.model)
    if done.windows:
        probe = next(done.windows.batches(1))[:, :128]
    return write_folder(done.model, done.tokenizer, Path(out), report, probe)


@dataclass(frozen=True, slots=True)
class _Done:
    """A compressed model in memory, and what is to be written with it."""

    model: Any
    tokenizer: Any
    windows: TokenWindows | None
    report: CompressionReport


def _factorise(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    out: str | Path | None,
    tokenizer: Any,
    windows: TokenWindows | None,
    options: CompressionOptions,
) -> _Done:
    """Load, plan, draw, walk the blocks, report: all but writing."""
    clock = Clock()
    with clock.phase("load"):
        loaded, name, tokenizer = _open(model, recipe, tokenizer, out)
    loaded = loaded.to(options.device) if options.device else loaded
    method = method_by_name(recipe.method)
    anatomy, ranks = allocate(loaded, recipe)
    if method.needs_moments and any(rank is not None for rank in ranks.ranks.values()):
        windows = windows or _draw(recipe, tokenizer)
        windows.check_vocabulary(num_embeddings(loaded))
    else:
        windows = None
    size = planned_size(loaded, anatomy, ranks)
    with _put_back_on_error(loaded, anatomy if loaded is model else anatomy.only(())):
        linears = factorise_blocks(loaded, anatomy, ranks, method, windows, options, clock)
    mark_compressed(loaded)
    report = CompressionReport(
        model=name,
        recipe=recipe,
        recipe_fingerprint=recipe.fingerprint(),
        calibration_fingerprint=windows.fingerprint() if windows else "",
        tokens=windows.tokens if windows else 0,
        size=size,
        linears=tuple(linears),
        seconds=clock.seconds,
        peak_bytes=peak_bytes(),
        environment=environment(loaded),
        warnings=(),
    )
    return _Done(loaded, tokenizer, windows, report)


def _open(
    model: str | Path | nn.Module,
    recipe: CompressionRecipe,
    tokenizer: Any,
    out: str | Path | None,
) -> tuple[Any, str, Any]:
    """Model in eval mode, its name, and its tokenizer if it has one or needs one."""
    if isinstance(model, nn.Module):
        require_dense(model, type(model).__name__)
        require_finite_weights(model, type(model).__name__)
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        return model.eval(), name, tokenizer
    if out is None:
        raise RecipeError("a model given by its path needs a folder to be written to: out=...")
    source = parse_source(model)
    loaded = load_model(source, recipe.dtype)
    require_dense(loaded, source.name)
    return loaded, source.name, tokenizer or load_tokenizer(source)


def _draw(recipe: CompressionRecipe, tokenizer: Any) -> TokenWindows:
    """Windows of the recipe's text."""
    if tokenizer is None:
        raise RecipeError("a model in memory needs tokenizer=... or windows=... to calibrate on")
    calibration = recipe.calibration
    generator = torch.Generator().manual_seed(calibration.seed)
    ids = tokenize(tokenizer, read_text(calibration))
    return draw_windows(ids, calibration.num_sequences, calibration.sequence_length, generator)


@contextmanager
def _put_back_on_error(model: Any, anatomy: Anatomy) -> Iterator[None]:
    """Leave a user's model as it was if a run fails half-way."""
    linears = {site.name: model.get_submodule(site.name) for site in anatomy.sites}
    try:
        yield
    except BaseException:
        for name, linear in linears.items():
            replace_linear(model, name, linear)
        raise


@contextmanager
def _gathered_warnings() -> Iterator[list[str]]:
    """Collect our warnings for the report, and give them on to the caller at the end."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SlimrankWarning)
        yield messages
        messages += dict.fromkeys(
            str(w.message) for w in caught if issubclass(w.category, SlimrankWarning)
        )
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
