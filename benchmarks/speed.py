"""Cost of the statistics pass against a plain forward, of all solves, and of load and save.

    python benchmarks/speed.py MODEL --text FILE --out results/speed.json

Forward and statistics pass run over the same tokens in the same batches, in turn; medians and the
ratio of medians are quoted, wall-clock and CPU. The forward is the whole model, head included; the
statistics pass is all that calibration does: embedding, replay of every block, second moments.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _record
import torch

import slimrank
from slimrank.calibration import collect_moments, draw_windows, embed_batches, read_text
from slimrank.checkpoint import mark_compressed
from slimrank.linalg import Moments
from slimrank.methods import METHODS, method_by_name
from slimrank.model import Anatomy, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.recipe import CalibrationRecipe, CompressionRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize
from slimrank.targets import find_work


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--num-sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    source = parse_source(options.model)
    model = load_model(source)
    recipe = CompressionRecipe.from_dict({"budget": {"param_ratio": 0.8}})
    ids = tokenize(load_tokenizer(source), read_text(CalibrationRecipe(source=(options.text,))))
    generator = torch.Generator().manual_seed(options.seed)
    windows = draw_windows(ids, options.num_sequences, options.sequence_length, generator)
    work = find_work(model, recipe)
    anatomy, ranks = work.anatomy, work.uniform(recipe)
    moments: dict[str, Moments] = {}

    def forward() -> None:
        for batch in windows.batches(options.batch_size):
            model(input_ids=batch, use_cache=False)

    def statistics_pass() -> None:
        moments.update(all_moments(model, anatomy, windows, options.batch_size))

    forward()
    plain, passes = [], []
    for _ in range(options.rounds):
        plain.append(timed(forward))
        passes.append(timed(statistics_pass))
    results: dict[str, Any] = {
        "tokens": windows.tokens,
        "forward_seconds": figures(plain),
        "statistics_pass_seconds": figures(passes),
        "ratio_of_medians": {
            "wall": median(passes, 0) / median(plain, 0),
            "cpu": median(passes, 1) / median(plain, 1),
        },
        "ratio_of_each_round_wall": [p[0] / f[0] for p, f in zip(passes, plain, strict=True)],
    }
    for name in METHODS:
        results[f"solve_all_{name}"] = solve_all(model, name, ranks.ranks, moments)
    results |= load_and_save(model, ranks.ranks, moments)
    settings = {
        "model": Path(options.model).name,
        "dtype": str(model.dtype),
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "linears": len(ranks.ranks),
    }
    _record.write(options.out, options.seed, settings, results)


def all_moments(model: Any, anatomy: Anatomy, windows: Any, batch_size: int) -> dict[str, Moments]:
    """Take the tokens through every block."""
    batches = embed_batches(model, anatomy, windows, batch_size)
    found: dict[str, Moments] = {}
    for index, block in enumerate(model.get_submodule(anatomy.path).children()):
        collected = collect_moments(model, block, index, anatomy.groups[index], batches)
        for group, moment in zip(anatomy.groups[index], collected.total, strict=True):
            found |= dict.fromkeys((site.name for site in group.sites), moment)
    return found


def solve_all(model: Any, method: str, ranks: Any, moments: dict[str, Moments]) -> dict[str, float]:
    """Decompose and truncate every linear once."""
    solver = method_by_name(method)

    def work() -> None:
        for name, rank in ranks.items():
            weight = model.get_submodule(name).weight.detach()
            solver.decompose(weight, moments[name]).truncate(rank)

    wall, cpu = timed(work)
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def load_and_save(model: Any, ranks: Any, moments: dict[str, Moments]) -> dict[str, Any]:
    """Save the compressed model, and load it in the way users do."""
    method = method_by_name("swift-svd")
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        factors = method.decompose(linear.weight.detach(), moments[name]).truncate(rank)
        replace_linear(model, name, LowRankLinear.from_factors(linear, factors))
    mark_compressed(model)
    with tempfile.TemporaryDirectory() as folder:
        save = timed(lambda: model.save_pretrained(folder))
        load = timed(lambda: slimrank.load(folder))
    return {"save_seconds": save[0], "load_seconds": load[0]}


def median(pairs: list[tuple[float, float]], which: int) -> float:
    return statistics.median(pair[which] for pair in pairs)


def figures(pairs: list[tuple[float, float]]) -> dict[str, float]:
    walls = [wall for wall, _ in pairs]
    return {
        "wall_median": median(pairs, 0),
        "wall_min": min(walls),
        "wall_max": max(walls),
        "cpu_median": median(pairs, 1),
    }


if __name__ == "__main__":
    main()
