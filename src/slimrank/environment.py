"""Where a run takes place, how long its phases take, and how much memory it needs."""

import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from slimrank import processes
from slimrank.errors import SlimrankWarning


@dataclass(slots=True)
class Clock:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what a block of code takes to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_bytes(device: torch.device | None = None) -> int:
    """Largest memory of this process so far: resident, or on a CUDA device."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(model: Any) -> dict[str, str]:
    """Versions, platform, and where and in what dtype the model is."""
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
        "processes": str(processes.count()),
    }


@contextmanager
def gathered_warnings() -> Iterator[list[str]]:
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
