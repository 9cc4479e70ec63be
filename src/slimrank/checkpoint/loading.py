"""Load a folder, and take nothing on trust."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from slimrank.checkpoint.foreign import told_as
from slimrank.checkpoint.sound import TRUSTED, require_sound
from slimrank.errors import CheckpointError

# transformers and its checks of a configuration let out anything, failed assertions included
LOAD_ERRORS = (Exception,)
OTHERWISE = ("gguf_file", "subfolder", "variant", "config")  # other files than those looked at


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model, compressed or dense, and insist that every tensor is there.

    ``AutoModelForCausalLM.from_pretrained`` does the same for a compressed folder once slimrank is
    imported, but only warns of a tensor that is missing outside the factors.

    Parameters
    ----------
    path : str or Path
        A folder, or a hub id.
    **kwargs
        Handed to ``from_pretrained``: `dtype`, `device_map` and so on. Unless they say otherwise,
        no code of the folder is run and no pickled weights are read.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode.

    Raises
    ------
    CheckpointError
        If the folder is missing or damaged, reaches out of itself, or describes more than it holds;
        or a tensor is missing, unexpected or of another shape.
    """
    folder = Path(path)
    asked = {**TRUSTED, **kwargs}
    if folder.is_dir() and asked["use_safetensors"] and not any(map(kwargs.get, OTHERWISE)):
        require_sound(folder, trusts_code=bool(asked["trust_remote_code"]))
    with told_as(CheckpointError, f"cannot load {path}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), output_loading_info=True, **asked
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            named = sorted(str(key) for key in info[what])
            raise CheckpointError(
                f"{path}: {what.replace('_', ' ')}: {', '.join(named[:3])}"
                + (f" and {len(named) - 3} more" if len(named) > 3 else "")
            )
    return model
