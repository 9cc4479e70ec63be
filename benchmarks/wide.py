"""Speed of a model with wide linears in transformers: dense, and of low rank in both layouts.

    python benchmarks/wide.py --out results/wide.json
    python benchmarks/wide.py --multiples 32 --compile --out results/wide-compiled.json
    GLIBC_TUNABLES=... python benchmarks/wide.py ... --out results/wide-compiled-kept.json
    python benchmarks/wide.py --model SmolLM2-135M-Instruct --out results/wide-smollm2.json

A random Llama whose linears are as wide as those of models of some billion parameters, and random
factors; speed depends on shapes alone. Or a model that is there, with random factors. Folders are
written and measured as `slimrank benchmark` does it: each in a process of its own, in turns. A
second round has ranks that are multiples of 32.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import _record
import torch
from layers import LAYOUTS, in_layout
from transformers import LlamaConfig, LlamaForCausalLM

from slimrank import benchmark
from slimrank.checkpoint import align_folder, mark_compressed
from slimrank.source import load_model, parse_source

ENVIRONMENT = ("GLIBC_TUNABLES", "TORCHINDUCTOR_MAX_AUTOTUNE")  # of what is set, what counts here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="this one's configuration and weights, and no random ones")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner-width", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="by torch.compile, weights packed")
    parser.add_argument("--folders", help="where they stay; they are removed if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    results = {}
    with tempfile.TemporaryDirectory() as passing:
        place = Path(options.folders or passing)
        dense = place / "dense"
        model = load_model(parse_source(options.model)) if options.model else made(options)
        model.to(getattr(torch, options.dtype))
        model.save_pretrained(dense)
        said = {n: value for n, value in vars(options).items() if n not in ("out", "folders")}
        said["model"] = options.model and Path(options.model).name
        told = {n: value for n, value in os.environ.items() if n in ENVIRONMENT}
        settings = said | shape(model.config) | told
        for multiple in options.multiples:
            folders = [
                folder(model, layout, multiple, options.keep, draw, place) for layout in LAYOUTS
            ]
            results[f"ranks of {multiple}"] = measured(dense, folders, options)
            _record.write(options.out, options.seed, settings, results)


def made(options: argparse.Namespace) -> Any:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.inner_width,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 4,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        return LlamaForCausalLM(config).eval()


def shape(config: Any) -> dict[str, int]:
    """What the results are told by, also of a model that was there."""
    return {
        "width": config.hidden_size,
        "inner_width": config.intermediate_size,
        "heads": config.num_attention_heads,
        "blocks": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
    }


def folder(
    model: Any, layout: str, multiple: int, keep: float, draw: torch.Generator, place: Path
) -> Path:
    """A compressed folder of random factors."""
    compressed = in_layout(model, layout, keep, draw, multiple)
    mark_compressed(compressed)
    out = place / f"{layout}-{multiple}"
    compressed.save_pretrained(out)
    align_folder(out)  # as `slimrank compress` does
    return out


def measured(dense: Path, folders: list[Path], options: argparse.Namespace) -> Any:
    """Rates of all, and of the layouts over the dense model."""
    report = benchmark(
        dense,
        against=folders,
        batches=options.batches,
        contexts=options.contexts,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        threads=options.threads,
        compiled=options.compile,
    )
    return [
        {
            "model": Path(model.name).name,
            "batch": case.batch,
            "context": case.context,
            "prefill tokens a second": case.prefill_rate,
            "decode tokens a second": case.decode_rate,
            "prefill to dense": 1.0 if prefill is None else 1 / prefill,
            "decode to dense": 1.0 if decode is None else 1 / decode,
            "weight bytes": model.weight_bytes,
            "cache bytes": case.cache_bytes,
        }
        for case, model, prefill, decode in report.rows()
    ]


if __name__ == "__main__":
    main()
