"""Perplexity and bytes of each method on a real model, against the dense one.

    python benchmarks/quality.py MODEL --calibration FILE --test FILE --out results/quality.json

For each method: compress to a folder; hold the bytes on disk against the report; in a fresh
process that imports slimrank and calls plain `from_pretrained`, hold the logits on a window
against those of the model in memory; measure perplexity on the test text, all of it.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import torch
from safetensors.torch import load_file, save_file

from slimrank import CompressionRecipe, compress
from slimrank.calibration import read_text
from slimrank.evaluation import perplexity
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize

FRESH = """
import sys, torch, slimrank
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = load_file(sys.argv[2])["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits.contiguous()}, sys.argv[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--methods", nargs="+", default=["svd", "svd-llm", "swift-svd"])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--num-windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    source = parse_source(options.model)
    tokenizer = load_tokenizer(source)
    text = read_text(CalibrationRecipe(source=(options.test,)))
    ids = tokenize(tokenizer, text)
    settings = {
        "model": Path(options.model).name,
        "dtype": "float32, dequantised from 4 bits" if source.is_gguf else "auto",
        "calibration": Path(options.calibration).name,
        "test": Path(options.test).name,
        "test_sha256": hashlib.sha256(Path(options.test).read_bytes()).hexdigest(),
        "keep": options.keep,
        "num_sequences": options.num_sequences,
        "sequence_length": options.sequence_length,
        "num_windows": options.num_windows or "all",
    }
    results: dict[str, Any] = {}
    for method in [*options.methods, "dense"]:
        results[method] = measure(method, source, tokenizer, ids, options)
        _record.write(options.out, options.seed, settings, results)


def measure(method: str, source: Any, tokenizer: Any, ids: torch.Tensor, options: Any) -> Any:
    model = load_model(source)
    found: dict[str, Any] = {}
    if method != "dense":
        recipe = CompressionRecipe.from_dict(
            {
                "budget": {"param_ratio": options.keep},
                "method": method,
                "calibration": {
                    "source": [options.calibration],
                    "num_sequences": options.num_sequences,
                    "sequence_length": options.sequence_length,
                    "seed": options.seed,
                },
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            out, dense = Path(folder) / "out", Path(folder) / "dense"
            model.save_pretrained(dense)
            start = time.perf_counter()
            report = compress(model, recipe, tokenizer=tokenizer, out=out)
            size = report.size
            before, after = (
                sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (dense, out)
            )
            low = [x for x in report.linears if x.rank is not None]
            found = {
                "compress_seconds": time.perf_counter() - start,
                "phases": report.seconds,
                "peak_bytes": report.peak_bytes,
                "size": size.model_dump(),
                "bytes_exact": before == size.weight_bytes_before and after == size.weight_bytes,
                "fresh_process_logits_equal": fresh_logits_equal(model, out, ids[:256][None]),
                "factorised": len(low),
                "worst_predicted_measured_gap": max(
                    abs(x.predicted_loss - x.measured_loss) / x.measured_loss for x in low
                ),
                "worst_predicted_stored_gap": max(
                    abs(x.predicted_loss - x.stored_loss) / x.stored_loss for x in low
                ),
                "worst_token_check": max((x.token_check or 0.0) for x in low),
                "calibration_fingerprint": report.calibration_fingerprint,
            }
    found["wikitext2_test"] = perplexity(
        model, ids, options.sequence_length, options.num_windows
    ).model_dump()
    return found


def fresh_logits_equal(model: Any, folder: Path, ids: torch.Tensor) -> bool:
    """Load in a process of its own, and compare logits bit by bit."""
    with tempfile.TemporaryDirectory() as passing:
        inputs, outputs = f"{passing}/ids.safetensors", f"{passing}/logits.safetensors"
        save_file({"ids": ids.contiguous()}, inputs)
        subprocess.run([sys.executable, "-c", FRESH, str(folder), inputs, outputs], check=True)
        with torch.no_grad():
            return torch.equal(model(ids).logits, load_file(outputs)["logits"])


if __name__ == "__main__":
    main()
