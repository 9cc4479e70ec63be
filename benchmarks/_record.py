"""What every benchmark writes beside its figures: environment, commit, command."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "slimrank": version("slimrank"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


# Taken when the script starts: the tree may move on while it runs.
COMMIT = {
    "commit": _git("rev-parse", "HEAD"),
    "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src")),
}


def write(
    path: str | Path, seed: int, settings: dict[str, Any], results: Any, quiet: bool = False
) -> None:
    """Write figures and where they come from as JSON, and print them."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **COMMIT,
        "command": " ".join([Path(sys.argv[0]).name, *(Path(a).name for a in sys.argv[1:])]),
        "seed": seed,
        "environment": environment(),
        "settings": settings,
        "results": results,
    }
    text = json.dumps(record, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
    if not quiet:
        print(text)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = " with AMX" if "amx_bf16" in flags else ""
    return (names[0] if names else platform.processor()) + extra
