"""What a run keeps beside its output: begun or gone on with, block by block, and cleared away."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank import processes
from slimrank.calibration import TokenWindows
from slimrank.checkpoint import (
    UNFINISHED_RUN,
    FinishedBlock,
    Profile,
    RunManifest,
    RunState,
    map_over,
    read_profile,
)
from slimrank.checkpoint.manifest import warn_of_differences
from slimrank.checkpoint.profile_state import (
    UNFINISHED_PROFILE,
    ProfileRun,
    ProfileState,
    removed_what_is_left,
)
from slimrank.environment import Clock, environment
from slimrank.errors import CheckpointError, NumericalWarning
from slimrank.model import is_mapped, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.recipe import CompressionRecipe
from slimrank.report import BlockReport, LinearReport


def keeps_blocks(
    recipe: CompressionRecipe, *, from_profile: bool = False, stream: bool = False
) -> bool:
    """Tell whether the finished blocks of a run are kept: it takes long, or has no other room.

    Parameters
    ----------
    recipe : CompressionRecipe
    from_profile : bool
        The user gives a profile.
    stream : bool
        Factors are not to be held in memory.
    """
    return stream or looks_at_text(recipe, from_profile=from_profile)


def looks_at_text(recipe: CompressionRecipe, *, from_profile: bool = False) -> bool:
    """Tell whether a run looks at text, and so takes long.

    Parameters
    ----------
    recipe : CompressionRecipe
    from_profile : bool
        The user gives a profile.

    Examples
    --------
    >>> def looks(**values):
    ...     return looks_at_text(CompressionRecipe(budget={"param_ratio": 0.5}, **values))
    >>> looks(), looks(method="aa-svd"), looks(method="svd", allocation="uniform")
    (True, True, False)
    """
    if recipe.is_sequential:
        return True
    if from_profile:
        return recipe.for_profile() != recipe and bool(recipe.make_method().needs)
    return bool(recipe.needs) or recipe.tune is not None or recipe.allocation != "uniform"


@contextmanager
def kept_run(
    out: Path,
    model: Any,
    recipe: CompressionRecipe,
    model_fingerprint: str,
    windows: TokenWindows | None,
    resume: bool,
    profile: Profile | None = None,
) -> Iterator[RunState]:
    """Begin a run, or go on with the one that was cut off, if there is one.

    What fails before anything is finished leaves nothing.

    Parameters
    ----------
    out : Path
    model : PreTrainedModel
    recipe : CompressionRecipe
    model_fingerprint : str
        Of the dense model.
    windows : TokenWindows or None
        All of them, held-out ones too; None if the run looks at no text.
    resume : bool
    profile : Profile, optional
        What factors are made from, if the user gave it.

    Raises
    ------
    CheckpointError
        If there is an unfinished run and it is not to be resumed, or is damaged, or of another
        model, recipe, text or profile; or another process works on it.

    Warns
    -----
    NumericalWarning
        If the run was begun on another machine, or with other versions.
    """
    versions = environment(model)
    marks: dict[str, Any] = {
        "recipe_fingerprint": recipe.fingerprint(),
        "model_fingerprint": model_fingerprint,
        "calibration_fingerprint": windows.fingerprint() if windows else "",
        "dtype": versions["dtype"],
        "profile_fingerprint": _profile_fingerprint(profile) if profile else "",
    }
    processes.require_same({"calibration text": marks["calibration_fingerprint"]})
    is_resumed = processes.agreed(resume and UNFINISHED_RUN.is_kept(out))
    manifest = RunManifest(**marks, versions=versions, ranks=None, allocation=None)
    with RunState.resume(out) if is_resumed else RunState.begin(out, manifest) as state:
        if is_resumed:
            state.require(**marks)
            warn_of_differences("run", state.manifest.versions, versions)
        try:
            yield state
        except BaseException:
            if state.is_bare:
                state.remove()
            raise


def _profile_fingerprint(profile: Profile) -> str:
    """SHA-256 of the hashes of its tensors."""
    return hashlib.sha256(json.dumps(sorted(profile.manifest.files.items())).encode()).hexdigest()


def warn_again(messages: Sequence[str]) -> None:
    """Give warnings once more that were given before a run was cut off."""
    for message in messages:
        warnings.warn(message, NumericalWarning, stacklevel=2)


def keep_block(
    state: RunState | None,
    model: Any,
    index: int,
    path: str,
    linears: Sequence[LinearReport],
    clock: Clock,
    block: BlockReport | None = None,
    messages: Sequence[str] = (),
) -> None:
    """Let a block count as finished: every order comes here once nothing of it will change.

    Parameters
    ----------
    state : RunState or None
        None if nothing is kept.
    model : PreTrainedModel
        With the block's layers in place.
    index : int
    path : str
        Dotted name of the block.
    linears : sequence of LinearReport
        Of its linears.
    clock : Clock
    block : BlockReport, optional
        Of a sequential run; then all tensors of the block are kept, and not only the factors.
    messages : sequence of str
        Warnings given while it was worked on.

    Raises
    ------
    CheckpointError
        If the disk is full or refuses.
    """
    if state is not None:
        with clock.phase("write"):
            tensors = _tensors(model, path, linears, is_whole=block is not None)
            state.save(index, tensors, linears, block, messages)
            _map_block(state, model, index, path)


def fill_block(state: RunState, model: Any, index: int, path: str) -> FinishedBlock:
    """Put the layers of a finished block into the model, and give its warnings again.

    Parameters
    ----------
    state : RunState
    model : PreTrainedModel
        The block is dense.
    index : int
    path : str
        Dotted name of the block.

    Raises
    ------
    CheckpointError
        If the file is damaged, or does not fit the model.

    Warns
    -----
    NumericalWarning
        What was warned of when the block was made.
    """
    finished = state.finished[index]
    tensors = state.load(index)
    try:
        for report in finished.linears:
            if report.rank is not None:
                linear = model.get_submodule(report.name)
                most = min(linear.weight.shape)
                if not report.name.startswith(f"{path}.") or not 1 <= report.rank <= most:
                    raise RuntimeError(
                        f"{report.name} of rank {report.rank} is none of its linears"
                    )
                layer = LowRankLinear.unfilled(linear, report.rank, pivoted=report.pivoted)
                replace_linear(model, report.name, layer)
        own = _tensors(model, path, finished.linears, is_whole=finished.block is not None)
        if own.keys() != tensors.keys():
            other = sorted(own.keys() ^ tensors.keys())
            raise RuntimeError(f"{other[0]} is in one of them only")
        model.get_submodule(path).load_state_dict(tensors, strict=False)
        _map_block(state, model, index, path)
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"block {index} of the unfinished run does not fit: {error}"
        ) from error
    warn_again(finished.warnings)
    return finished


def _map_block(state: RunState, model: Any, index: int, path: str) -> None:
    """Leave a finished block on disk too, where the model is streamed."""
    if is_mapped(model):
        map_over(model.get_submodule(path), state.folder / state.finished[index].file)


def _tensors(
    model: Any, path: str, linears: Sequence[LinearReport], *, is_whole: bool
) -> Mapping[str, Tensor]:
    """Tensors of a block by their names in it: all of them, or those of its factors."""
    tensors: dict[str, Tensor] = model.get_submodule(path).state_dict()
    if is_whole:
        return tensors
    low = tuple(f"{x.name.removeprefix(path)}."[1:] for x in linears if x.rank is not None)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(low)}


def finished_profile(state: RunState) -> Profile | None:
    """Open the profile that a run's ranks are chosen from, if it stands.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    processes.alone(lambda: removed_what_is_left(state.profile))
    if not processes.agreed(state.profile.exists()):
        return None
    try:
        return read_profile(state.profile)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; to begin anew, delete {state.folder}") from error


def unfinished_profile(state: RunState) -> ProfileState:
    """Begin that profile, or go on with it. It is of whatever the run is of.

    Raises
    ------
    CheckpointError
        If it is damaged, or the disk refuses.
    """
    if processes.agreed(UNFINISHED_PROFILE.is_kept(state.profile)):
        return ProfileState.resume(state.profile)
    return ProfileState.begin(state.profile, ProfileRun(marks={}, versions={}))
