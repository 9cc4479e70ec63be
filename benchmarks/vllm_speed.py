"""Speed of folders in vLLM on a CPU: prefill and decode, in turns.

    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/vllm_speed.py DENSE PLAIN PIVOTED \
        --out results/vllm.json

Needs the venv of `make test-vllm`. All engines are there at once; in every round each takes its
turn. Prompts are random tokens, other ones in each round, so that nothing is found in a cache.
"""

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _record
import torch
from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="the dense one first")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    engines = {Path(folder).name: engine(folder, options) for folder in options.folders}
    results = []
    for batch in options.batches:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for number in range(options.rounds + 1):
            for name, llm in engines.items():
                figures = once(llm, batch, options, draw)
                if number:
                    found[name].append(figures)
        results += rows(found, batch, options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["folders"] = list(engines)
    settings["vllm-cpu"] = version("vllm-cpu")
    _record.write(options.out, options.seed, settings, results)


def engine(folder: str, options: argparse.Namespace) -> LLM:
    return LLM(
        folder,
        dtype=options.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=options.prompt + options.new_tokens,
        max_num_seqs=max(options.batches),
        max_num_batched_tokens=max(options.batches) * options.prompt,
        enforce_eager=options.eager,
        disable_log_stats=True,
    )


def once(
    llm: LLM, batch: int, options: argparse.Namespace, draw: torch.Generator
) -> tuple[float, float]:
    """Seconds of a prompt with its first token, and of each token behind it."""
    first = seconds(llm, batch, 1, options, draw)
    whole = seconds(llm, batch, options.new_tokens, options, draw)
    return first, (whole - first) / (options.new_tokens - 1)


def seconds(
    llm: LLM, batch: int, new: int, options: argparse.Namespace, draw: torch.Generator
) -> float:
    ids = torch.randint(1000, (batch, options.prompt), generator=draw).tolist()
    prompts: Any = [{"prompt_token_ids": row} for row in ids]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    taken = time.perf_counter() - start
    assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
    return taken


def rows(
    found: dict[str, list[tuple[float, float]]], batch: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    medians = {
        name: [statistics.median(column) for column in zip(*figures, strict=True)]
        for name, figures in found.items()
    }
    dense = next(iter(medians.values()))
    return [
        {
            "folder": name,
            "batch": batch,
            "prefill tokens a second": batch * options.prompt / prefill,
            "decode tokens a second": batch / step,
            "prefill to dense": dense[0] / prefill,
            "decode to dense": dense[1] / step,
            "rounds": found[name],
        }
        for name, (prefill, step) in medians.items()
    ]


if __name__ == "__main__":
    main()
