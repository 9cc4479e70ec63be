"""What `slimrank plan` says of memory, disk and passes, beside what runs really take.

    OMP_NUM_THREADS=1 python benchmarks/estimates.py --out results/estimates.json

Random Llama-like models are compressed, each run in a process of its own. Memory is the largest
resident set (``VmHWM``, reset before the run) above the resident set before it, once a tiny model
has been compressed by the same recipe: imports, and what libraries keep for themselves, are left
out. Disk is what lies beside the output, looked at every few hundredths of a second. Passes are
counted by hooks at the linears of the blocks: held-out text and checks are in those forwards, and
what is run again for its gradient counts as two backwards, the second of which ends early.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import _record
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimrank import CompressionOptions, CompressionRecipe, TokenWindows, compress, plan
from slimrank.environment import Clock
from slimrank.nn import LowRankLinear
from slimrank.report import NeedsReport

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "35M float32": {
        "dtype": "float32",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "vocab_size": 16_000,
    },
    "113M bfloat16": {
        "dtype": "bfloat16",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "vocab_size": 32_000,
    },
    "88M float32, tied": {
        "dtype": "float32",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "vocab_size": 16_000,
        "tie_word_embeddings": True,
    },
}
TINY = {"dtype": "float32", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CALIBRATION = {"num_sequences": 16, "sequence_length": 512, "held_out_sequences": 4}
REFINED = {"method": "aa-svd", "refine": {"preset": "fast", "epochs": 1}}
TUNED = {"method": "swift-svd", "tune": {"epochs": 1}}
TWICE = {"effort": "balanced", "passes": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast": ({"effort": "fast"}, {}),
    "fast, streamed": ({"effort": "fast"}, {"stream": True}),
    "balanced": ({}, {}),
    "balanced, streamed": ({}, {"stream": True}),
    "balanced, streamed, memory": ({}, {"stream": True, "memory": 50_000_000}),
    "aa-svd refined": (REFINED, {}),
    "aa-svd refined, streamed": (REFINED, {"stream": True}),
    "aa-svd refined, streamed, memory": (REFINED, {"stream": True, "memory": 50_000_000}),
    "two passes": (TWICE, {}),
    "two passes, streamed": (TWICE, {"stream": True}),
    "tuned": (TUNED, {}),
}
FEWER = (
    "fast",
    "balanced",
    "balanced, streamed, memory",
    "aa-svd refined, streamed",
    "tuned",
)
BFLOAT16 = {"dtype": "bfloat16"}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-70B": (
        "LlamaConfig",
        {
            **BFLOAT16,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "Llama-4-Maverick, 400B": (
        "Llama4TextConfig",
        {
            **BFLOAT16,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "vocab_size": 202048,
        },
    ),
}
LIMIT = 16_000_000_000
LARGE_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast": ({"effort": "fast"}, {}),
    "fast, streamed, memory": ({"effort": "fast"}, {"stream": True, "memory": LIMIT}),
    "balanced": ({}, {}),
    "balanced, streamed, memory": ({}, {"stream": True, "memory": LIMIT}),
    "aa-svd, streamed, memory": ({"method": "aa-svd"}, {"stream": True, "memory": LIMIT}),
    "best": ({"effort": "best"}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runs", nargs="*", choices=RUNS, help="all of the first, fewer of others")
    parser.add_argument("--out")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    results: dict[str, Any] = {"planned only": planned_only(), "measured": {}}
    settings = {"models": MODELS, "runs": RUNS, "calibration": CALIBRATION}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            dense, tiny = Path(folder) / "dense", Path(folder) / "tiny"
            subprocess.run(
                [sys.executable, __file__, "--work", "make", name, str(dense), ""], check=True
            )
            subprocess.run(
                [sys.executable, __file__, "--work", "make", "", str(tiny), ""], check=True
            )
            for run in options.runs or (RUNS if name == next(iter(MODELS)) else FEWER):
                found = measure(Path(folder), run)
                results["measured"][f"{name}: {run}"] = found
                say(f"{name}: {run}", found)
                if options.out:
                    _record.write(options.out, 0, settings, results, quiet=True)


def planned_only() -> dict[str, Any]:
    """What no machine here could run: from configurations alone, with 128 x 2,048 tokens."""
    found: dict[str, Any] = {}
    for name, (kind, values) in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            getattr(transformers, kind)(**values).save_pretrained(folder)
            for run, (recipe, options) in LARGE_RUNS.items():
                start = time.perf_counter()
                wanted = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}, **recipe})
                needs = plan(folder, wanted, CompressionOptions(**options)).needs
                found[f"{name}: {run}"] = told(needs) | {"seconds": time.perf_counter() - start}
    return found


def told(needs: NeedsReport) -> dict[str, Any]:
    """Of a plan."""
    return {
        "memory": needs.memory_bytes,
        "largest": needs.largest.name,
        "held": needs.largest.memory,
        "disk": needs.disk_bytes,
        "stays": needs.stays_bytes,
        "passes": needs.passes.model_dump(),
        "phases": {phase.name: sum(phase.memory.values()) for phase in needs.phases},
    }


def say(name: str, found: dict[str, Any]) -> None:
    planned, seen, ratios = (found[k] for k in ("planned", "measured", "planned_over_measured"))
    print(f"{name}: {seen['seconds']:.0f} s")
    for what in ("memory", "disk"):
        both = f"{planned[what] / 1e6:.0f} planned, {seen[what] / 1e6:.0f} MB measured"
        print(f"  {what}: {both}, ratio {ratios[what]:.2f}")
    print(f"  passes: {planned['passes']}; {seen['passes']}")
    for phases in (planned["phases"], seen["phases"]):
        print("   ", {phase: round(size / 1e6) for phase, size in phases.items()}, flush=True)


def work(kind: str, name: str, *arguments: str) -> None:
    """What a process of its own is for."""
    torch.set_num_threads(1)
    if kind == "make":
        make(MODELS.get(name, TINY), Path(arguments[0]))
    else:
        run(name, *map(Path, arguments))


def make(values: dict[str, Any], folder: Path) -> None:
    config = LlamaConfig(**{"vocab_size": 64, **HEADS, **values})
    dtype = getattr(torch, values["dtype"])
    torch.random.default_generator.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
    ).save_pretrained(folder)


def recipe_of(run: str) -> CompressionRecipe:
    values = RUNS[run][0]
    return CompressionRecipe.from_dict(
        {"budget": {"param_ratio": 0.6}, "calibration": CALIBRATION, **values}
    )


def run(name: str, folder: Path, dense: Path) -> None:
    """Compress a tiny model, and then the one that is measured; print what it took."""
    recipe, options = recipe_of(name), CompressionOptions(**RUNS[name][1])
    tiny = folder / "tiny"
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    small = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"num_sequences": 4})}
    )
    compress(
        tiny, small, out=folder / "out" / "tiny", windows=windows(tiny, 8, 64), options=options
    )
    shutil.rmtree(folder / "out" / "tiny")
    count = recipe.calibration.num_sequences
    is_simple = recipe.is_of_text_alone and recipe.tune is None and not recipe.is_sequential
    if not (is_simple and recipe.allocation == "uniform"):  # which takes all that it is given
        count += recipe.calibration.held_out_sequences
    ids = windows(dense, count, recipe.calibration.sequence_length)
    passes = counted_passes(dense, recipe)
    phases: dict[str, int] = {}
    with peaks_by_phase(phases):
        before = resident("VmRSS")
        reset_peak()
        start = time.perf_counter()
        compress(dense, recipe, out=folder / "out" / "model", windows=ids, options=options)
        seconds = time.perf_counter() - start
        cpu = os.times()
        phases["rest"] = max(phases.get("rest", 0), resident("VmHWM"))
    shown = {phase: peak - before for phase, peak in phases.items()}
    print(
        json.dumps(
            {
                "seconds": seconds,
                "user": cpu.user,
                "system": cpu.system,
                "memory": max(shown.values()),
                "phases": shown,
                "passes": passes(),
            }
        )
    )


def windows(folder: Path, count: int, length: int) -> TokenWindows:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    return TokenWindows(tuple(torch.randint(vocabulary, (count, length), generator=generator)))


def measure(folder: Path, run: str) -> dict[str, Any]:
    """Run in a process of its own, and watch the disk meanwhile."""
    recipe, options = recipe_of(run), CompressionOptions(**RUNS[run][1])
    planned = plan(folder / "dense", recipe, options).needs
    command = [sys.executable, __file__, "--work", "run", run, str(folder), str(folder / "dense")]
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.03):
            peak[0] = max(peak[0], bytes_below(folder / "out"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    done.set()
    thread.join()
    measured = json.loads(found.stdout.splitlines()[-1])
    measured["disk"] = peak[0]
    measured["stays"] = bytes_below(folder / "out")
    said = told(planned)
    ratios = {
        "memory": said["memory"] / measured["memory"],
        "disk": said["disk"] / measured["disk"],
    }
    return {"planned": said, "measured": measured, "planned_over_measured": ratios}


def bytes_below(folder: Path) -> int:
    """Of all files that stand at this moment."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_size
            except OSError:
                continue
    return total


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def peaks_by_phase(peaks: dict[str, int]) -> Iterator[None]:
    """Credit the largest resident set to the phase at hand."""
    plain = Clock.phase

    def credit(name: str) -> None:
        peaks[name] = max(peaks.get(name, 0), resident("VmHWM"))
        reset_peak()

    @contextmanager
    def phase(self: Clock, name: str) -> Iterator[None]:
        credit("rest")
        with plain(self, name):
            yield
        credit(name)

    Clock.phase = phase  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Clock.phase = plain  # type: ignore[method-assign]


def counted_passes(dense: Path, recipe: CompressionRecipe) -> Any:
    """Count tokens that linears of blocks are run on, in units of all of them on all tokens."""
    config = LlamaConfig.from_pretrained(dense)
    with torch.device("meta"):
        blocks = LlamaForCausalLM(config).model.layers
    weights = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    sample = recipe.calibration
    whole = weights * sample.num_sequences * sample.sequence_length
    sizes = {(m.out_features, m.in_features) for m in blocks.modules() if isinstance(m, nn.Linear)}
    found = {"forwards": 0, "backwards": 0}

    def count(module: nn.Module, arguments: Any, output: Any) -> None:
        is_linear = isinstance(module, (nn.Linear, LowRankLinear))
        if is_linear and (module.out_features, module.in_features) in sizes:
            work = arguments[0].shape[:-1].numel() * module.out_features * module.in_features
            found["forwards"] += work
            found["backwards"] += work if output.requires_grad else 0

    torch.nn.modules.module.register_module_forward_hook(count)
    return lambda: {key: value / whole for key, value in found.items()}


if __name__ == "__main__":
    main()
