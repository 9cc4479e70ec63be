"""See that a model folder asks for nothing but what is in it, before anything of it is built."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slimrank.checkpoint.foreign import reason
from slimrank.checkpoint.size import read_headers, saved_tensors
from slimrank.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EXPLICIT = "transformers_weights"  # names another file, or index, in config.json
COUNTS = ("layer", "layers", "blocks", "depth", "experts")  # keys end so that say how often
FEW = 256  # repetitions that any model may have
MOST_EXPERTS = 2**14  # of a configuration without weights
SMALL = 2**20  # numbers
TRUSTED = {"trust_remote_code": False, "use_safetensors": True}  # no code, no pickle


def require_sound(folder: Path, trusts_code: bool = False) -> None:
    """Refuse a folder that reaches out of itself, brings code, or is far larger than its files.

    Only ``config.json``, the index and the headers of the weight files are read, and no memory is
    taken for what they claim.

    Parameters
    ----------
    folder : Path
        Of a model in safetensors, dense or compressed.
    trusts_code : bool
        Code that the configuration names may be run: only its sizes and the files are looked at,
        and sizes of a class that transformers lacks are not, beyond the number of its layers.

    Raises
    ------
    CheckpointError
        If the configuration is damaged, names code to fetch, or describes more layers or numbers
        than the weight files hold; if a weight file is outside the folder, damaged, or not there.
    """
    files = own_weight_files(folder)
    headers = read_headers(files)
    values = require_sound_config(folder, headers, trusts_code)
    is_foreign = trusts_code and "auto_map" in values
    if not is_foreign and not isinstance(values.get("quantization_config"), dict):
        _require_numbers(folder, headers)
    if not files:
        raise CheckpointError(
            f"{folder} holds no safetensors file; pickled weights (.bin) are not read: convert them"
        )


def require_sound_config(
    folder: Path, headers: Mapping[str, Tensor] | None = None, trusts_code: bool = False
) -> dict[str, Any]:
    """Read ``config.json``, and refuse one that brings code or repeats layers without an end.

    Parameters
    ----------
    folder : Path
    headers : mapping of str to Tensor, optional
        Of the weight files, if they are there.
    trusts_code : bool
        Code that it names may be run.

    Raises
    ------
    CheckpointError
    """
    values = read_config(folder)
    if not trusts_code:
        _require_no_code(folder, values)
    tensors = headers or {}
    most = max(len(tensors), FEW)
    sizes = [max(t.shape, default=0) for t in tensors.values()] or [MOST_EXPERTS]
    most_experts = max(most, *sizes)
    for key, number in _counts(values):
        if number > (most_experts if key.endswith("experts") else most):
            raise CheckpointError(
                f"{folder / CONFIG} says {key} {number}, and the weight files hold "
                f"{len(tensors)} tensors"
            )
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` as plain values.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}; it is no model folder")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no configuration of a model")
    return values


def own_weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers takes of a folder.

    ``model.safetensors``, or else what its index names, and what the configuration names instead;
    all safetensors files of a folder that has neither.

    Raises
    ------
    CheckpointError
        If configuration or index is damaged, or one of the files is named elsewhere.
    """
    taken: list[str] = [
        place[EXPLICIT]
        for place in _mappings(read_config(folder))
        if isinstance(place.get(EXPLICIT), str)
    ]
    usual = next((name for name in (WEIGHTS, INDEX) if (folder / name).is_file()), None)
    taken += [path.name for path in folder.glob("*.safetensors")] if usual is None else [usual]
    names: set[Any] = set()
    for name in taken:
        names |= _indexed(named_file(folder, name)) if name.endswith(".index.json") else {name}
    return [named_file(folder, name) for name in sorted(names, key=str)]


def named_file(folder: Path, name: Any) -> Path:
    """Path of a file that is named in a folder, once it is seen to be there.

    Links in the folder are followed: whoever made the folder here has set them.

    Raises
    ------
    CheckpointError
        If the name leads out of the folder, or to no file.
    """
    cannot_be = f"{folder} names a file that cannot be: {name!r}"
    if not isinstance(name, str):
        raise CheckpointError(cannot_be)
    if PurePath(name).anchor or ".." in PurePath(name).parts:
        raise _outside(folder, name)
    try:
        is_file = (folder / name).resolve(strict=True).is_file()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} lacks {name}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(cannot_be) from error
    if not is_file:
        raise CheckpointError(cannot_be)
    return folder / name


def own_file(folder: Path, name: Any) -> Path:
    """Path of a file that lies in a folder itself, and so may be copied.

    Links into the blobs of a hub cache are what its snapshots are made of.

    Raises
    ------
    CheckpointError
        As `named_file`, and if it is a link to what lies elsewhere.
    """
    path, root = named_file(folder, name), folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append((root.parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(place) for place in roots):
        raise _outside(folder, name)
    return path


def _outside(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} names {name}, which lies outside of it; put the file itself there"
    )


def _indexed(index: Path) -> set[Any]:
    """Names of weight files, whatever they are."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of weight files") from error


def _require_no_code(folder: Path, values: Any) -> None:
    """Refuse kernels by name: transformers would fetch and run them."""
    for place in _mappings(values):
        for key, value in place.items():
            if "_implementation" in key and "/" in json.dumps(value):
                raise CheckpointError(
                    f"{folder / CONFIG} names code to run in {key}: {value}; take it out"
                )


def _mappings(values: Any) -> Iterator[dict[str, Any]]:
    """A mapping and all that are in it; how deep, JSON was read before."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += value.values()
        elif isinstance(value, list):
            left += value


def _counts(values: Any) -> Iterator[tuple[str, int]]:
    """Keys that say how often a part is repeated."""
    for place in _mappings(values):
        for key, value in place.items():
            if key.endswith(COUNTS) and isinstance(value, int):
                yield key, value


def _require_numbers(folder: Path, headers: Mapping[str, Tensor]) -> None:
    """Hold the sizes of a dense model, on the meta device, against those of its files.

    transformers itself makes random numbers of the size that the configuration says, and compares
    then.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"cannot read {folder / CONFIG}: {reason(error)}") from error
    tensors = saved_tensors(model)
    for name in sorted(tensors.keys() & headers.keys()):
        if tensors[name].numel() != headers[name].numel():
            raise CheckpointError(
                f"{name} has shape {tuple(headers[name].shape)}, {folder / CONFIG} says "
                f"{tuple(tensors[name].shape)}"
            )
    claimed, stored = (sum(t.numel() for t in x.values()) for x in (tensors, headers))
    if headers and claimed > 2 * stored + SMALL:
        raise CheckpointError(
            f"{folder / CONFIG} describes {claimed} parameters, the weight files hold {stored}"
        )
