"""Time of exact global allocation on the shapes of a 70B model, and how far it is from optimal.

    python benchmarks/global_allocation.py --out results/global_allocation.json

Curves are random: spectra that fall by a power between 0.3 and 1.5, flattened or broken off in some
linears, at scales that differ by up to a factor of 1,000.
"""

import argparse
import time
from typing import Any, get_args

import _record
import torch

from slimrank.allocation import Budget, Layout, LinearShape, allocate_global, uniform
from slimrank.linalg import tail_energy

SIDES = {
    "q": (8192, 8192),
    "k": (1024, 8192),
    "v": (1024, 8192),
    "o": (8192, 8192),
    "gate": (28672, 8192),
    "up": (28672, 8192),
    "down": (8192, 28672),
}


def curve(rank: int, generator: torch.Generator) -> torch.Tensor:
    power, scale, floor, end = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -(0.3 + 1.2 * power)
    if floor < 0.3:
        values = values.clamp(min=float(values[int(floor * rank)]))
    if end < 0.1:
        values[int((0.5 + 5 * end) * rank) :] = 0
    noise = torch.rand(rank, generator=generator, dtype=torch.float64)
    values = (values * (1 + 0.1 * noise)).sort(descending=True).values
    return 1000.0**scale * tail_energy(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    names = [
        (f"{block}.{kind}", sides)
        for block in range(options.blocks)
        for kind, sides in SIDES.items()
    ]
    losses = {name: curve(min(sides), generator) for name, sides in names}
    results: dict[str, Any] = {}
    for layout in get_args(Layout):
        shapes = [LinearShape(name, *sides, layout) for name, sides in names]
        for keep in (0.9, 0.8, 0.6, 0.4):
            budget = Budget(keep)
            seconds, cpu_seconds = [], []
            for _ in range(options.rounds):
                start, start_cpu = time.perf_counter(), time.process_time()
                found = allocate_global(shapes, losses, budget)
                seconds.append(time.perf_counter() - start)
                cpu_seconds.append(time.process_time() - start_cpu)
            even = uniform(shapes, budget).ranks
            allowed = budget.target_params(shapes, 0)
            kept = found.plan.params(shapes)
            results[f"{layout} {keep}"] = {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,  # of one thread: the machine may be shared
                "dense_linears": sum(rank is None for rank in found.plan.ranks.values()),
                "unspent_params": allowed - kept,
                "predicted_loss": found.predicted_loss,
                "uniform_loss": sum(float(losses[n][r]) for n, r in even.items() if r is not None),
                # LP duality: no plan within the budget loses less than this
                "least_possible_loss": _dual(shapes, losses, found.marginal, allowed),
            }
    settings = {"blocks": options.blocks, "linears": len(names), "sides": SIDES}
    _record.write(options.out, options.seed, settings, results)


def _dual(
    shapes: list[LinearShape], losses: dict[str, torch.Tensor], worth: float, allowed: int
) -> float:
    """Lagrangian bound: the least of loss + worth x params over all plans, less worth x budget."""
    costs: dict[tuple[int, int], torch.Tensor] = {}
    bound = -worth * allowed
    for shape in shapes:
        sides, largest = (shape.out_features, shape.in_features), shape.break_even_rank
        if sides not in costs:
            ranks = range(1, largest + 1)
            costs[sides] = torch.tensor([shape.params(r) for r in ranks], dtype=torch.float64)
        at_ranks = losses[shape.name][1 : largest + 1] + worth * costs[sides]
        bound += min(float(at_ranks.min()), worth * shape.dense_params)
    return bound


if __name__ == "__main__":
    main()
