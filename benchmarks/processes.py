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
from safetensors.torch import load_file

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


def distance(one: Path, other: Path) -> float:
    """Largest difference of two folders' weights, to the largest entry of each tensor."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    gaps = [
        float((tensor.double() - others[name].double()).abs().max() / tensor.abs().max())
        for name, tensor in weights.items()
        if tensor.numel() and tensor.is_floating_point()
    ]
    return max(gaps)


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
            gaps.append(distance(outs[1], outs[2]))
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
        "largest_difference_of_weights": max(gaps),
        "same_ranks": True,
    }
    _record.write(options.out, 0, settings, results)


if __name__ == "__main__":
    main()
