"""Load a folder, and take nothing on trust."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from slimrank.errors import CheckpointError

LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError),
    SafetensorError,
)


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model, compressed or dense, and insist that every tensor is there.

    ``AutoModelForCausalLM.from_pretrained`` does the same for a compressed folder once slimrank is
    imported, but only warns of a tensor that is missing outside the factors.

    Parameters
    ----------
    path : str or Path
        A folder, or a hub id.
    **kwargs
        Handed to ``from_pretrained``: `dtype`, `device_map` and so on.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode.

    Raises
    ------
    CheckpointError
        If the folder is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), output_loading_info=True, **kwargs
        )
    except LOAD_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        line = " ".join(str(error).split())[:400]
        raise CheckpointError(f"cannot load {path}: {line}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            named = sorted(str(key) for key in info[what])
            raise CheckpointError(
                f"{path}: {what.replace('_', ' ')}: {', '.join(named[:3])}"
                + (f" and {len(named) - 3} more" if len(named) > 3 else "")
            )
    return model
