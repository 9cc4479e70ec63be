"""Dynamic against uniform ranks, from one profile: perplexity on test text, and the alpha curves.

    python benchmarks/allocation.py MODEL --profile FOLDER --test FILE --out results/allocation.json

Alpha is chosen on the held-out part of the calibration text, inside `compress`; the test text is
looked at afterwards, once for each model.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import _record

from slimrank import CompressionRecipe, compress
from slimrank.calibration import read_text
from slimrank.evaluation import perplexity
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--num-windows", type=int)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    source = parse_source(options.model)
    tokenizer = load_tokenizer(source)
    ids = tokenize(tokenizer, read_text(CalibrationRecipe(source=(options.test,))))
    settings = {
        "model": Path(options.model).name,
        "test": Path(options.test).name,
        "test_sha256": hashlib.sha256(Path(options.test).read_bytes()).hexdigest(),
        "sequence_length": options.sequence_length,
        "num_windows": options.num_windows or "all",
    }
    results: dict[str, Any] = {}
    for keep in options.sizes:
        found: dict[str, Any] = {}
        for allocation in ("uniform", "swift"):
            model = load_model(source)
            recipe = CompressionRecipe.from_dict(
                {"budget": {"param_ratio": keep}, "allocation": allocation}
            )
            report = compress(model, recipe, tokenizer=tokenizer, profile=options.profile)
            test = perplexity(model, ids, options.sequence_length, options.num_windows)
            found[allocation] = {
                "test": test.model_dump(),
                "target_params": report.size.target_params,
                "target_params_before": report.size.target_params_before,
                "allocation": report.allocation.model_dump() if report.allocation else None,
                "seconds": report.seconds,
                "warnings": report.warnings,
            }
            results[str(keep)] = found
            _record.write(options.out, 0, settings, results)
        values = {name: entry["test"]["value"] for name, entry in found.items()}
        found["gain"] = 1 - values["swift"] / values["uniform"]
    _record.write(options.out, 0, settings, results)


if __name__ == "__main__":
    main()
