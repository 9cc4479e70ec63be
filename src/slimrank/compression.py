"""The one data flow: anatomy, tokens, ranks, blocks, report, folder."""

import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimrank.allocation import RankPlan
from slimrank.calibration import (
    Batch,
    TokenWindows,
    check_on_tokens,
    collect_moments,
    default_batch_size,
    draw_windows,
    embed_batches,
    read_text,
)
from slimrank.checkpoint import folder_bytes, mark_compressed, require_writable, write_folder
from slimrank.errors import NumericalError, NumericalWarning, RecipeError, SlimrankWarning
from slimrank.linalg import Moments, effective_rank, output_loss
from slimrank.methods import Method, method_by_name
from slimrank.model import Anatomy, LinearSite, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.planning import PROBE_TOKENS, allocate, num_embeddings, planned_size
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport, LinearReport, SizeReport
from slimrank.source import (
    load_model,
    load_tokenizer,
    parse_source,
    require_dense,
    require_finite_weights,
    tokenize,
)

Track = Callable[[Iterable[int], str], Iterable[int]]


def _untracked(steps: Iterable[int], _what: str) -> Iterable[int]:
    return steps


@dataclass(frozen=True, slots=True)
class CompressionOptions:
    """How to run: never changes the result beyond rounding, and is not saved.

    Parameters
    ----------
    device : str, optional
        Where forwards and solves run: 'cpu', 'cuda', 'cuda:1'. Default: where the model is.
    batch_size : int, optional
        Windows at once; by default about 4,096 tokens.
    track : callable
        Wraps the loop over blocks, given a description, to show progress.
    """

    device: str | None = None
    batch_size: int | None = None
    track: Track = _untracked


@dataclass(slots=True)
class _Clock:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    clock = _Clock()
    if out is not None:
        require_writable(Path(out))
    with _gathered_warnings() as messages:
        with clock.phase("load"):
            loaded, name, tokenizer = _open(model, recipe, tokenizer, out)
        loaded = loaded.to(options.device) if options.device else loaded
        method = method_by_name(recipe.method)
        anatomy, ranks = allocate(loaded, recipe)
        shrinks = any(rank is not None for rank in ranks.ranks.values())
        if method.needs_moments and shrinks:
            windows = windows or _draw(recipe, tokenizer)
            windows.check_vocabulary(num_embeddings(loaded))
        else:
            windows = None
        planned = planned_size(loaded, anatomy, ranks)
        with _put_back_on_error(loaded, anatomy if loaded is model else anatomy.only(())):
            linears = _walk(loaded, anatomy, ranks, method, windows, options, clock)
        mark_compressed(loaded)

    def report(weight_bytes: int) -> CompressionReport:
        return CompressionReport(
            model=name,
            recipe=recipe,
            recipe_fingerprint=recipe.fingerprint(),
            calibration_fingerprint=windows.fingerprint() if windows else "",
            tokens=windows.tokens if windows else 0,
            size=SizeReport(**(planned.model_dump() | {"weight_bytes": weight_bytes})),
            linears=tuple(linears),
            seconds=dict(clock.seconds),
            peak_bytes=_peak_bytes(),
            environment=_environment(loaded),
            warnings=tuple(messages),
        )

    if out is None:
        return report(folder_bytes(loaded))
    probe = torch.arange(PROBE_TOKENS)[None] % num_embeddings(loaded)
    if windows:
        probe = next(windows.batches(1))[:, :128]
    return write_folder(loaded, tokenizer, Path(out), report, probe)


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


def _walk(
    model: Any,
    anatomy: Anatomy,
    ranks: RankPlan,
    method: Method,
    windows: TokenWindows | None,
    options: CompressionOptions,
    clock: _Clock,
) -> list[LinearReport]:
    """Take the original activations through the blocks; factorise each when they have passed."""
    linears = {
        site.name: LinearReport(
            name=site.name,
            rank=None,
            params_before=site.shape.dense_params,
            params=site.shape.dense_params,
            tokens=0,
        )
        for site in anatomy.sites
    }
    factored = anatomy.only(name for name, rank in ranks.ranks.items() if rank is not None)
    blocks = list(model.get_submodule(anatomy.path).children())
    last = max((site.block for site in factored.sites), default=-1)
    batches: list[Batch] = []
    if windows:
        length = max(len(window) for window in windows.windows)
        size = options.batch_size or default_batch_size(length)
        with clock.phase("calibrate"):
            batches = embed_batches(model, anatomy, windows, size)
    for index in options.track(range(last + 1), "compressing"):
        for linear in _block(model, blocks[index], index, factored, ranks, method, batches, clock):
            linears[linear.name] = linear
    return list(linears.values())


def _block(
    model: Any,
    block: nn.Module,
    index: int,
    anatomy: Anatomy,
    ranks: RankPlan,
    method: Method,
    batches: list[Batch],
    clock: _Clock,
) -> list[LinearReport]:
    """Moments of one block, its solves, the check on tokens, the swap."""
    groups = anatomy.groups[index]
    moments: dict[str, Moments] = {}
    of_last: dict[str, Moments] = {}
    entering = batches[-1] if batches else None
    if batches:
        with clock.phase("calibrate"):
            collected = collect_moments(model, block, index, groups, batches)
        for group, total, last in zip(groups, collected.total, collected.last, strict=True):
            moments |= dict.fromkeys((site.name for site in group.sites), total)
            of_last |= dict.fromkeys((site.name for site in group.sites), last)
    replacements: dict[str, LowRankLinear] = {}
    reports: list[LinearReport] = []
    with clock.phase("solve"):
        for site in (site for group in groups for site in group.sites):
            rank = ranks.ranks[site.name]
            assert rank is not None
            replacement, linear = _solve(model, site, rank, method, moments.get(site.name))
            replacements[site.name] = replacement
            reports.append(linear)
    gaps: dict[str, float] = {}
    if entering is not None:
        with clock.phase("check"):
            gaps = check_on_tokens(model, block, index, entering, replacements, of_last)
    for name, replacement in replacements.items():
        replace_linear(model, name, replacement)
    return [r.model_copy(update={"token_check": gaps.get(r.name)}) for r in reports]


def _solve(
    model: Any, site: LinearSite, rank: int, method: Method, moments: Moments | None
) -> tuple[LowRankLinear, LinearReport]:
    """Solve one linear, and say what was promised and what the factors give."""
    start = time.perf_counter()
    linear = model.get_submodule(site.name)
    tokens = moments.tokens if moments else 0
    if moments and tokens < rank:
        warnings.warn(
            f"{site.name} saw {tokens} tokens, fewer than its rank {rank}; what they leave open is "
            "settled by the weight alone",
            NumericalWarning,
            stacklevel=2,
        )
    try:
        solved = method.decompose(linear.weight.detach(), moments)
    except NumericalError as error:
        raise type(error)(f"{site.name}: {error}") from error
    factors = solved.truncate(rank)
    replacement = LowRankLinear.from_factors(linear, factors)
    moment = moments.original if moments else None
    energy = solved.energy or 1.0
    report = LinearReport(
        name=site.name,
        rank=rank,
        params_before=site.shape.dense_params,
        params=site.shape.params(rank),
        tokens=tokens,
        effective_rank=effective_rank(solved.singular_values),
        predicted_loss=solved.loss(rank) / energy,
        measured_loss=output_loss(linear.weight, factors, moment) / energy,
        stored_loss=output_loss(linear.weight, replacement.factors(), moment) / energy,
        jitter=solved.jitter,
        seconds=time.perf_counter() - start,
    )
    return replacement, report


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


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _environment(model: Any) -> dict[str, str]:
    parameter = next(model.parameters())
    return {
        "slimrank": version("slimrank"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }
