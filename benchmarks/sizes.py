"""What a further size costs: one profile and six sizes, against methods that start anew.

    python benchmarks/sizes.py MODEL --calibration FILE --profile FOLDER --out results/sizes.json

MODEL is best a folder of safetensors: dequantising a GGUF file takes longer than all else that a
further size costs. In one run, on one model and text:

- `slimrank.profile`, then `compress(profile=...)` at 0.9, 0.8, ... 0.4, each from the model on disk
  to a folder written, read back and compared;
- `svd-llm` at one size from scratch. With its whitening not cached, every size costs that. With it
  cached, a further size costs that less the calibration pass: its singular value decompositions are
  done again, as in its authors' code;
- a truncated singular value decomposition of each sample's output activations, as Dobi-SVD takes
  them, on a few linears, EXTRAPOLATED to all samples and linears by shape: never run whole.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _record
import torch

from slimrank import CompressionRecipe, compress, profile
from slimrank.source import load_model, parse_source

SIZES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--profile", required=True, help="Folder to write; stays.")
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    settings = {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "num_sequences": options.num_sequences,
        "sequence_length": options.sequence_length,
        "sizes": SIZES,
    }
    results: dict[str, Any] = {"swift-svd": sizes_from_profile(options)}
    _record.write(options.out, options.seed, settings, results)
    results["svd-llm"] = from_scratch(options)
    _record.write(options.out, options.seed, settings, results)
    results["per-sample svd, EXTRAPOLATED"] = per_sample(options)
    results["ratios"] = ratios(results)
    _record.write(options.out, options.seed, settings, results)


def recipe(options: argparse.Namespace, method: str, keep: float) -> CompressionRecipe:
    return CompressionRecipe.from_dict(
        {
            "budget": {"param_ratio": keep},
            "method": method,
            "calibration": {
                "source": [options.calibration],
                "num_sequences": options.num_sequences,
                "sequence_length": options.sequence_length,
                "seed": options.seed,
            },
        }
    )


def sizes_from_profile(options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    found = profile(options.model, recipe(options, "swift-svd", 1.0), options.profile)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "profile_seconds": seconds,
        "profile_phases": found.manifest.seconds,
        "profile_bytes": sum(f.stat().st_size for f in Path(options.profile).iterdir()),
        "size_seconds": {},
        "size_phases": {},
    }
    for keep in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = compress(
                options.model,
                recipe(options, "swift-svd", keep),
                out=Path(folder) / "out",
                profile=options.profile,
            )
            result["size_seconds"][str(keep)] = time.perf_counter() - start
            result["size_phases"][str(keep)] = report.seconds
    further = [result["size_seconds"][str(keep)] for keep in SIZES[1:]]
    result["first_size_seconds"] = seconds + result["size_seconds"][str(SIZES[0])]
    result["further_size_seconds"] = sorted(further)[len(further) // 2]
    result["further_over_first"] = result["further_size_seconds"] / result["first_size_seconds"]
    return result


def from_scratch(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = compress(
            options.model, recipe(options, "svd-llm", SIZES[0]), out=Path(folder) / "out"
        )
        seconds = time.perf_counter() - start
    return {
        "size_seconds": seconds,
        "phases": report.seconds,
        "further_size_seconds_whitening_cached": seconds - report.seconds["calibrate"],
    }


def per_sample(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one truncated SVD of one sample's outputs, by width, times samples and linears."""
    model = load_model(parse_source(options.model))
    linears = [
        m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    ]
    counts = Counter(m.out_features for m in linears)
    generator = torch.Generator().manual_seed(options.seed)
    measured: dict[str, float] = {}
    for width in counts:
        # Random activations: LAPACK's time depends on the shape only.
        outputs = torch.randn(options.sequence_length, width, generator=generator)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.linalg.svd(outputs, full_matrices=False)
            times.append(time.perf_counter() - start)
        measured[str(width)] = sorted(times)[1]
    total = sum(measured[str(w)] * n for w, n in counts.items()) * options.num_sequences
    return {
        "measured_seconds_of_one_svd_by_width": measured,
        "linears_by_width": {str(w): n for w, n in counts.items()},
        "extrapolated_seconds_of_one_size": total,
        "leaves_out": "the forwards, and the incremental principal components over samples",
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = results["swift-svd"], results["svd-llm"]
    one, cached = theirs["size_seconds"], theirs["further_size_seconds_whitening_cached"]
    first, further = ours["first_size_seconds"], ours["further_size_seconds"]
    each = results["per-sample svd, EXTRAPOLATED"]["extrapolated_seconds_of_one_size"]
    table: dict[str, Any] = {}
    for count in (1, 3, 6):
        whole = first + (count - 1) * further
        table[f"{count} sizes"] = {
            "svd-llm, not cached": count * one / whole,
            "svd-llm, whitening cached": (one + (count - 1) * cached) / whole,
            "per-sample svd, EXTRAPOLATED": count * each / whole,
        }
    table["paper, against svd-llm not cached, LLaMA-7B on a GPU"] = {
        "1 size": "1.6 to 2.0",
        "3 sizes": "up to 3.8",
    }
    return table


if __name__ == "__main__":
    main()
