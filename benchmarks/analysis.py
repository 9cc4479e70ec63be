"""Effective rank and importance of a profiled model, and whether they go together.

python benchmarks/analysis.py PROFILE --out results/analysis.json
"""

import argparse
from pathlib import Path

import _record

from slimrank import read_profile
from slimrank.analysis import analyze


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    found = read_profile(options.profile)
    report = analyze(found)
    settings = {
        "model": Path(found.manifest.model).name,
        "tokens": report.tokens,
        "calibration_fingerprint": report.calibration_fingerprint,
    }
    results = report.model_dump(
        include={"importance", "importance_after_norm", "kinds", "overall", "warnings"}
    )
    _record.write(options.out, found.manifest.calibration.seed, settings, results)


if __name__ == "__main__":
    main()
