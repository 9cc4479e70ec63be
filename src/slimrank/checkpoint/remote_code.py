"""The modelling file by which a folder loads where slimrank is not installed.

``config.json`` names it under ``auto_map``. transformers runs it with ``trust_remote_code=True``;
slimrank needs none, and never runs it.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers

from slimrank.checkpoint.sound import CONFIG, read_config
from slimrank.errors import CheckpointError, ModelError
from slimrank.nn import RemappedFactors, SplitLinear

REMOTE_CODE = "modeling_low_rank.py"
AUTO_CLASS = "AutoModelForCausalLM"
REFERENCE = "modeling_low_rank.LowRankForCausalLM"
NOT_SERVED = {
    SplitLinear: "projections that were taken apart for a cache of latents",
    RemappedFactors: "packed factors",
}


def require_served_by_code(model: Any) -> None:
    """See that the modelling file can load a model.

    Parameters
    ----------
    model : PreTrainedModel

    Raises
    ------
    ModelError
        If transformers lacks its class, or it has something that takes slimrank.
    """
    why = why_not_by_code(model)
    if why is not None:
        raise ModelError(f"the modelling file cannot load {why}; only slimrank can")


def why_not_by_code(model: Any) -> str | None:
    """What in a model the modelling file cannot load; None if it can load all of it."""
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        return f"models that transformers has no class for, as {kind.__name__}"
    for module in model.modules():
        for strange, what in NOT_SERVED.items():
            if isinstance(module, strange):
                return what
    return None


def add_remote_code(model: Any, folder: Path) -> None:
    """Put the modelling file into a folder that was written, and name it in ``config.json``.

    Whatever code the configuration named before, it does not any more.

    Parameters
    ----------
    model : PreTrainedModel
        That the folder is of.
    folder : Path

    Raises
    ------
    ModelError
        As `require_served_by_code`.
    CheckpointError
        If what is read back is not what was written.
    """
    require_served_by_code(model)
    code = files("slimrank.checkpoint").joinpath(REMOTE_CODE).read_bytes()
    values = read_config(folder) | {"auto_map": {AUTO_CLASS: REFERENCE}}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (folder / REMOTE_CODE).write_bytes(code)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if (folder / REMOTE_CODE).read_bytes() != code or read_config(folder) != values:
        raise CheckpointError(f"{REMOTE_CODE} or {CONFIG} does not read back as it was written")


def has_remote_code(folder: Path) -> bool:
    """Tell whether a folder carries the modelling file, and names it."""
    return (folder / REMOTE_CODE).is_file() and _is_ours(read_config(folder).get("auto_map"))


def forget_remote_code(config: Any) -> None:
    """Take the name of the file out of a configuration in memory: saving it writes no file.

    Parameters
    ----------
    config : PretrainedConfig
        Code of others that it names is left.
    """
    if _is_ours(getattr(config, "auto_map", None)):
        del config.auto_map


def _is_ours(auto_map: Any) -> bool:
    """Whether it names our file; a hub's name may stand before."""
    named = auto_map.get(AUTO_CLASS) if isinstance(auto_map, dict) else None
    return isinstance(named, str) and named.rpartition("--")[2] == REFERENCE
