"""Time of one linear: dense, and of low rank in both layouts at the same number of parameters.

    python benchmarks/layers.py [--model MODEL] --out results/layers.json

Random square linears. Decode is one token, through a row of layers that together outgrow the
caches, as the weights of a model do; prefill is many tokens through a few. The layouts take turns
at every layer; medians over all calls and their ratios are quoted. On a GPU a row of layers is one
CUDA graph, as serving engines have it, or with --compiled one graph of torch.compile, and the
layouts take turns at every row. With a model, it
also decodes with all of its linears in each layout, of random factors.
"""

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import _record
import torch
from torch import nn

from slimrank.allocation import LinearShape
from slimrank.model import discover, replace_linear
from slimrank.nn import LowRankLinear
from slimrank.source import load_model, parse_source

LAYOUTS = ("plain", "pivoted")
PREFILL_COPIES = 4
PROMPT, NEW = 32, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--working-set", type=int, default=256, help="MiB of dense weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="a row of layers is one graph")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = torch.Generator().manual_seed(options.seed)
    cases = itertools.product(options.widths, options.dtypes, options.keeps)
    results = [case(*chosen, options, draw) for chosen in cases]
    if options.model:
        results += [whole(options.model, keep, options.rounds, draw) for keep in options.keeps]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    if options.model:
        settings["model"] = Path(options.model).name
    if options.device != "cpu":
        settings["gpu"] = torch.cuda.get_device_name(options.device)
    _record.write(options.out, options.seed, settings, results)


def case(
    width: int, dtype: str, keep: float, options: argparse.Namespace, draw: torch.Generator
) -> dict[str, Any]:
    """Microseconds of a layer, and what they are of the dense and of the plain one."""
    kind = getattr(torch, dtype)
    budget = int(keep * width * width)
    shapes = [LinearShape("linear", width, width, layout=name) for name in LAYOUTS]
    ranks = {shape.layout: shape.largest_rank(budget) for shape in shapes}
    copies = options.working_set * 2**20 // (width * width * kind.itemsize)
    rows = {
        name: [layer(name, width, rank, kind, draw).to(options.device) for _ in range(copies)]
        for name, rank in [("dense", 0), *ranks.items()]
    }
    found: dict[str, Any] = {"width": width, "dtype": dtype, "keep": keep, "ranks": ranks}
    for phase, tokens, few in (("decode", 1, copies), ("prefill", options.tokens, PREFILL_COPIES)):
        part = {name: layers[:few] for name, layers in rows.items()}
        inputs = torch.randn(1, tokens, width, generator=draw).to(options.device, kind)
        clock = timed if options.device == "cpu" else timed_graphs
        if options.compiled:
            clock = timed_compiled
        medians = clock(part, inputs, options.rounds)
        found[phase] = {
            "microseconds": medians,
            "plain to dense": medians["plain"] / medians["dense"],
            "pivoted to dense": medians["pivoted"] / medians["dense"],
            "pivoted to plain": medians["pivoted"] / medians["plain"],
        }
    print(found, flush=True)
    return found


def whole(model: str, keep: float, rounds: int, draw: torch.Generator) -> dict[str, Any]:
    """Milliseconds of a new token of a model."""
    dense = load_model(parse_source(model)).eval()
    models = {"dense": dense, **{name: in_layout(dense, name, keep, draw) for name in LAYOUTS}}
    prompt = torch.randint(dense.config.vocab_size, (1, PROMPT), generator=draw)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, each in models.items():
            start = time.perf_counter()
            each.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=NEW,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
            times[name].append(1e3 * (time.perf_counter() - start) / NEW)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    found = {
        "model": Path(model).name,
        "keep": keep,
        "milliseconds a token": medians,
        "pivoted to dense": medians["pivoted"] / medians["dense"],
        "pivoted to plain": medians["pivoted"] / medians["plain"],
    }
    print(found, flush=True)
    return found


def in_layout(
    dense: Any, layout: Any, keep: float, draw: torch.Generator, multiple_of: int = 1
) -> Any:
    """A copy whose linears are of low rank, of random factors."""
    model = copy.deepcopy(dense)
    for groups in discover(model, torch.arange(12)[None]).groups:
        for site in (site for group in groups for site in group.sites):
            linear = model.get_submodule(site.name)
            out, inner = linear.weight.shape
            shape = LinearShape("linear", out, inner, layout=layout)
            rank = shape.largest_rank(int(keep * out * inner))
            rank -= rank % multiple_of
            made = LowRankLinear.unfilled(linear, rank, pivoted=layout == "pivoted")
            for part in (made.latent, made.expand):
                part.weight.data.normal_(0, 0.02, generator=draw)
            if made.pivoted:
                rows = torch.randperm(out, generator=draw)[:rank].sort().values
                made.pivots.copy_(rows.to(torch.int32))
            replace_linear(model, site.name, made)
    return model.eval()


def layer(name: str, width: int, rank: int, dtype: torch.dtype, draw: torch.Generator) -> nn.Module:
    """A layer of any weights; pivots are scattered, as they are in models."""
    if name == "dense":
        return nn.Linear(width, width, bias=False, dtype=dtype)
    made = LowRankLinear(width, width, rank, bias=False, dtype=dtype, pivoted=name == "pivoted")
    if made.pivoted:
        rows = torch.randperm(width, generator=draw)[:rank]
        made.pivots = rows.sort().values.to(torch.int32)
    return made


@torch.inference_mode()
def timed(rows: dict[str, list[nn.Module]], inputs: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median microseconds of a call; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for layers in zip(*rows.values(), strict=True):
            for name, each in zip(rows, layers, strict=True):
                start = time.perf_counter()
                each(inputs)
                if number:
                    times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def timed_compiled(
    rows: dict[str, list[nn.Module]], inputs: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median microseconds of a layer in a compiled graph of all of its row."""
    for layers in rows.values():
        for each in layers:
            each(inputs)  # row numbers are known before they are compiled
    graphs = {name: torch.compile(nn.Sequential(*layers)) for name, layers in rows.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 3):
        for name, graph in graphs.items():
            start = time.perf_counter()
            graph(inputs)
            if number >= 3:
                times[name].append(1e6 * (time.perf_counter() - start) / len(rows[name]))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def timed_graphs(
    rows: dict[str, list[nn.Module]], inputs: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median microseconds of a layer in a CUDA graph of all of its row."""
    graphs = {name: captured(layers, inputs) for name, layers in rows.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, graph in graphs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            if number:
                times[name].append(1e6 * (time.perf_counter() - start) / len(rows[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(layers: list[nn.Module], inputs: torch.Tensor) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(torch.cuda.Stream()):
        for each in layers:
            each(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in layers:
            each(inputs)
    return graph


if __name__ == "__main__":
    main()
