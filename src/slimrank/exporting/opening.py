"""A compressed folder that is to be exported."""

from pathlib import Path
from typing import Any

from slimrank.checkpoint import (
    CARD,
    HEALING,
    QUANTIZATION,
    RECIPE,
    REMOTE_CODE,
    REPORT,
    load,
    read_folder,
    require_writable,
)
from slimrank.source import require_finite_weights

LEFT_OUT = (CARD, RECIPE, REPORT, QUANTIZATION, HEALING, REMOTE_CODE)  # of the factors


def open_folder(source: Path, out: Path) -> Any:
    """Load the model of a folder in its own dtype, once it is known that `out` can be written.

    Raises
    ------
    CheckpointError
        If `source` is none of ours or damaged, or `out` exists or cannot be written.
    NumericalError
        If a weight is not finite.
    """
    read_folder(source)
    require_writable(out)
    model = load(source, dtype="auto")
    require_finite_weights(model, str(source))
    return model
