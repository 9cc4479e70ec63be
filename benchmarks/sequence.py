"""Time and peak memory of each phase of a sequential run, against one calibration forward.

    python benchmarks/sequence.py MODEL --calibration FILE --out results/sequence.json

The plain forward takes the same sequences through the decoder without its head, in the same
batches, before and after the run. Memory is sampled every 20 ms and credited to the phase at hand.
"""

import argparse
import copy
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _record
import torch

from slimrank import CompressionRecipe, compress
from slimrank.calibration import default_batch_size, draw_windows, hold_out, read_text
from slimrank.environment import Clock
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="further sequences")
    parser.add_argument("--refine", nargs="*", default=["off", "fast"])
    parser.add_argument("--methods", nargs="*", default=["swift-svd", "shift-aware", "aa-svd"])
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    source = parse_source(options.model)
    dense = load_model(source)
    ids = tokenize(
        load_tokenizer(source), read_text(CalibrationRecipe(source=(options.calibration,)))
    )
    generator = torch.Generator().manual_seed(0)
    windows = draw_windows(
        ids, options.num_sequences + options.held_out, options.sequence_length, generator
    )
    results: dict[str, Any] = {}
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    settings |= {"model": Path(options.model).name, "calibration": Path(options.calibration).name}
    runs = [(method, "off") for method in options.methods if "off" in options.refine]
    runs += [("aa-svd", preset) for preset in options.refine if preset != "off"]
    for method, preset in runs:
        recipe = CompressionRecipe.from_dict(
            {
                "budget": {"param_ratio": options.keep},
                "method": method,
                "order": "sequential",
                "refine": preset,
                "layout": "plain",
                "calibration": {"held_out_sequences": options.held_out},
            }
        )
        results[f"{method}, refine {preset}"] = measure(dense, recipe, windows)
        _record.write(options.out, 0, settings, results, quiet=True)
        print(method, preset, results[f"{method}, refine {preset}"]["summary"], flush=True)


def measure(dense: Any, recipe: CompressionRecipe, windows: Any) -> dict[str, Any]:
    model = copy.deepcopy(dense)
    calibration, held_out = hold_out(windows, recipe.calibration.held_out_sequences)
    forwards = [plain_forward(model, calibration)]
    peaks: dict[str, int] = {}
    with sampled_memory(peaks):
        start = time.perf_counter()
        report = compress(model, recipe, windows=windows)
        seconds = time.perf_counter() - start
    forwards.append(plain_forward(dense, calibration))
    forward = statistics.median(forwards)
    passes = sum(report.seconds[p] for p in ("embed", "original", "shifted"))
    share = held_out.tokens / calibration.tokens if held_out else 0.0
    return {
        "summary": {
            "seconds": seconds,
            "plain_forward_seconds": forward,
            "passes_seconds": passes,
            "passes_over_forward": passes / forward,
            "held_out_share_of_tokens": share,
            "passes_over_forward_of_all_sequences": passes / forward / (1 + share),
            "check_seconds": report.seconds["check"],
            "solve_seconds": report.seconds["solve"],
        },
        "forwards": forwards,
        "phases": report.seconds,
        "peak_resident_bytes_by_phase": peaks,
        "blocks": [block.model_dump() for block in report.blocks],
    }


@torch.no_grad()
def plain_forward(model: Any, windows: Any) -> float:
    size = default_batch_size(len(windows.windows[0]))
    start = time.perf_counter()
    for batch in windows.batches(size):
        model.model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


@contextmanager
def sampled_memory(peaks: dict[str, int]) -> Iterator[None]:
    """Credit the resident memory to the phase at hand."""
    current, done = ["other"], threading.Event()
    plain = Clock.phase

    @contextmanager
    def phase(self: Clock, name: str) -> Iterator[None]:
        before, current[0] = current[0], name
        with plain(self, name):
            yield
        current[0] = before

    def sample() -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not done.wait(0.02):
            size = int(Path("/proc/self/statm").read_text().split()[1]) * page
            peaks[current[0]] = max(peaks.get(current[0], 0), size)

    thread = threading.Thread(target=sample, daemon=True)
    Clock.phase = phase  # type: ignore[method-assign, assignment]
    thread.start()
    try:
        yield
    finally:
        Clock.phase = plain  # type: ignore[method-assign]
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
