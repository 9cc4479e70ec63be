"""Speed-up of a run that several processes share, against one process with as many threads.

    python benchmarks/processes.py MODEL --text FILE --out results/processes.json

Each round starts one process, and then two, of one thread each, by torchrun: the same recipe on the
same sequences. Quoted are medians over rounds of what the report says of each phase, in the first
process, so loading is apart; and how far the weights of both are from one another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _record
import torch

import slimrank

STATISTICS = ("calibrate", "gradients", "magnitudes")


def run(count: int, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Compress by so many processes; give what the report says."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    text = ["--calibration", options.text, "--num-sequences", str(options.num_sequences)]
    command = [*start, "--nproc-per-node", str(count), "-m", "slimrank", "compress"]
    command += [options.model, str(out), "--keep", "0.8", "--json", *options.how.split()]
    command += [*text, "--sequence-length", str(options.sequence_length)]
    threads = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | threads, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def distances(one: Path, other: Path) -> tuple[float, float]:
    """Largest difference of two folders, in what linears are and in how they are stored.

    The first is that of the products of factors, to their norm. The second is that of stored
    entries, to the largest one of each tensor: pivots that are nearly as good as others may change
    places, and then the same product is stored by other rows.
    """
    models = [slimrank.load(folder) for folder in (one, other)]
    products, entries = [], []
    for name, module in models[0].named_modules():
        if isinstance(module, slimrank.LowRankLinear):
            dense, twin = (m.get_submodule(name).factors().dense().double() for m in models)
            products.append(float((dense - twin).norm() / dense.norm()))
    others = dict(models[1].named_parameters())
    for name, tensor in models[0].named_parameters():
        if tensor.numel():
            entries.append(float((tensor - others[name]).abs().max() / tensor.abs().max()))
    return max(products), max(entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--how", default="--effort balanced")
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    gaps = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            outs = {count: Path(folder) / f"of {count}" for count in seconds}
            reports = {count: run(count, options, out) for count, out in outs.items()}
            gaps.append(distances(outs[1], outs[2]))
        for count, report in reports.items():
            seconds[count].append(report["seconds"])
        ranks = [[linear["rank"] for linear in r["linears"]] for r in reports.values()]
        assert ranks[0] == ranks[1]
    medians = {
        count: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        for count, runs in seconds.items()
    }
    by_kind = {
        "statistics": [p for p in STATISTICS if p in medians[1]],
        **{phase: [phase] for phase in medians[1] if phase not in STATISTICS},
    }
    speed_up = {
        kind: statistics.median(
            sum(one[p] for p in phases) / sum(two[p] for p in phases)
            for one, two in zip(seconds[1], seconds[2], strict=True)
        )
        for kind, phases in by_kind.items()
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "model", "text")}
    results = {
        "seconds_of_one": medians[1],
        "seconds_of_two": medians[2],
        "speed_up": speed_up,
        "rounds": seconds,
        "largest_difference_of_products": max(gap for gap, _ in gaps),
        "largest_difference_of_entries": max(gap for _, gap in gaps),
        "same_ranks": True,
    }
    _record.write(options.out, 0, settings, results)


if __name__ == "__main__":
    main()
