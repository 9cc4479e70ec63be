"""One pass over a model, kept on disk: every size is then made from it without calibration."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimrank.blockwise import BlockPass, check_block, pass_blocks, solve
from slimrank.calibration import METRIC, ActivationStore, TokenWindows, hold_out
from slimrank.checkpoint import (
    Profile,
    ProfiledLinear,
    ProfileManifest,
    read_profile,
    renamed_when_done,
    require_space,
    require_writable,
)
from slimrank.checkpoint.profile import (
    HELD_OUT,
    SPECTRA,
    block_file,
    write_manifest,
    write_tensors,
)
from slimrank.drawing import draw
from slimrank.environment import Clock, environment, gathered_warnings, peak_bytes
from slimrank.errors import RecipeError
from slimrank.linalg import Decomposition
from slimrank.methods import KFACSVD, STREAMS
from slimrank.model import Anatomy, weights_fingerprint
from slimrank.nn import LowRankLinear
from slimrank.options import CompressionOptions
from slimrank.planning import profile_bytes
from slimrank.recipe import CompressionRecipe
from slimrank.source import open_dense
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
) -> Profile:
    """Take the original activations through a model once, and keep what every size is made from.

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

    Returns
    -------
    Profile

    Raises
    ------
    SlimrankError
        As `slimrank.compress`; then nothing is written. Also if the disk has no room.

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
    require_writable(out)
    with clock.phase("load"):
        loaded, name, tokenizer = open_dense(model, recipe.dtype, tokenizer)
    loaded = loaded.to(options.device) if options.device else loaded
    source = ProfiledModel(loaded, name, weights_fingerprint(loaded))
    with ExitStack() as stack:
        with gathered_warnings() as warned:
            work = find_work(loaded, recipe, for_kv_cache)
            stack.enter_context(work.put_back_after(loaded))
            windows = windows or draw(recipe.calibration, tokenizer, with_held_out=True)
        return write_profile(
            out, source, work, recipe, windows, options, clock, spectra_only, warned
        )


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

    Raises
    ------
    CheckpointError
        If the disk has no room.
    """
    model = source.model
    require_space(out, profile_bytes(model, work, recipe, spectra_only))
    windows.check_vocabulary(num_embeddings(model))
    windows, held_out = hold_out(windows, recipe.calibration.held_out_sequences)
    with ExitStack() as stack:
        folder = stack.enter_context(renamed_when_done(out))
        with gathered_warnings() as messages:
            store = stack.enter_context(ActivationStore(options.memory, folder.parent))
            statistics = statistics or collect_statistics(
                model, work.anatomy, recipe.needs, recipe, windows, options, clock, store
            )
            found = _take_pass(
                folder, model, work, recipe, windows, options, clock, spectra_only, statistics
            )
        if held_out is not None:
            kept = {str(number): window for number, window in enumerate(held_out.windows)}
            found["files"] |= write_tensors(folder, HELD_OUT, kept)
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
        write_manifest(folder, manifest)
    return read_profile(out)


def _take_pass(
    folder: Path,
    model: Any,
    work: Work,
    recipe: CompressionRecipe,
    windows: TokenWindows,
    options: CompressionOptions,
    clock: Clock,
    spectra_only: bool,
    statistics: Statistics | None,
) -> dict[str, Any]:
    """Walk the blocks; write the bases of each, then all spectra; say what the manifest needs."""
    count = len(work.anatomy.groups)
    spectra: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    linears: list[ProfiledLinear] = []
    importance: list[float] = []
    after_norm = None
    for passed in pass_blocks(model, work.anatomy, windows, options, clock, count, "profiling"):
        if statistics is not None:
            known = {site.name: passed.moments[site.name] for site in passed.sites}
            passed = replace(passed, moments={n: statistics.of(n, m) for n, m in known.items()})
        found = _profile_block(
            model, work, passed, recipe, clock, spectra, spectra_only, statistics
        )
        bases = {
            f"{entry.name}.{part}": columns
            for entry, solved in found
            for part, columns in (("basis", solved.basis), ("dual", solved.dual))
            if entry.stored_rank and columns is not None
        }
        with clock.phase("write"):
            if bases:
                files |= write_tensors(folder, block_file(passed.index), bases)
        linears += [
            entry.model_copy(update={"mean_square_gradient": _mean_square(statistics, entry.name)})
            for entry, _ in found
        ]
        importance.append(passed.influence)
        after_norm = passed.influence_after_norm
    files |= write_tensors(folder, SPECTRA, spectra)
    return {
        "importance": tuple(importance),
        "importance_after_norm": after_norm,
        "linears": tuple(linears),
        "files": files,
    }


def _profile_block(
    model: Any,
    work: Work,
    passed: BlockPass,
    recipe: CompressionRecipe,
    clock: Clock,
    spectra: dict[str, Tensor],
    spectra_only: bool,
    statistics: Statistics | None,
) -> list[tuple[ProfiledLinear, Decomposition]]:
    """Solve the linears of a block; check its moments on tokens, at half of the largest ranks."""
    method = recipe.make_method()
    found: dict[str, tuple[partial[ProfiledLinear], Decomposition]] = {}
    halves: dict[str, LowRankLinear] = {}
    for site in passed.sites:
        linear = model.get_submodule(site.name)
        with clock.phase("solve"):
            rank = work.useful_rank(site.shape)
            moments = passed.moments[site.name].ridged(recipe.relative_ridge())
            gradient = statistics.pop_mean_gradient(site.name) if statistics else None
            solved = solve(model, site, rank, method, moments, gradient)
            decomposition = solved.decomposition
            if solved.changes is not None:
                spectra[f"{site.name}.changes"] = solved.changes
            spectra[f"{site.name}.singular_values"] = decomposition.singular_values
            metric = method.metric(moments) if isinstance(method, KFACSVD) else None
            spectra[f"{site.name}.measured_losses"] = decomposition.measured_losses(
                moments.original, metric
            )
            if rank:
                half = decomposition.truncate((rank + 1) // 2)
                halves[site.name] = LowRankLinear.from_factors(linear, half)
        entry = partial(
            ProfiledLinear,
            name=site.name,
            block=site.block,
            kind=module_type(site.name, work.anatomy),
            out_features=site.shape.out_features,
            in_features=site.shape.in_features,
            tokens=solved.tokens,
            energy=decomposition.energy,
            jitter=decomposition.jitter,
            stored_rank=0 if spectra_only else rank,
            seconds=solved.seconds,
        )
        found[site.name] = entry, decomposition
    gaps = check_block(model, passed, halves, clock)
    return [(entry(token_check=gaps.get(name)), solved) for name, (entry, solved) in found.items()]


def _mean_square(statistics: Statistics | None, name: str) -> float | None:
    has_metric = statistics is not None and (METRIC, name) in statistics.store
    return statistics.mean_square(name) if statistics is not None and has_metric else None


def module_type(name: str, anatomy: Anatomy) -> str:
    """Name of a linear within its block, numbers as ``*``: what it shares a pool of ranks with.

    Examples
    --------
    >>> module_type("model.layers.3.mlp.experts.7.up_proj", Anatomy("model.layers", (), None))
    'mlp.experts.*.up_proj'
    """
    _, *local = name.removeprefix(f"{anatomy.path}.").split(".")
    return ".".join("*" if re.fullmatch(r"\d+", part) else part for part in local)
