"""The cache of latents on a real model: same function, bytes at long context, time to decode.

    python benchmarks/kv_cache.py MODEL --profile FOLDER --test FILE --out results/kv_cache.json

The latent model is `--keep 1 --kv-keep 0.5`: keys and values factorised, all else dense. It is held
against itself without a cache (the same function?) and against the true dense model with
transformers' own cache (bytes and milliseconds a token), in interleaved rounds.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import _record
import torch
from torch import Tensor
from transformers import DynamicCache

from slimrank import CompressionRecipe, compress
from slimrank.calibration import read_text
from slimrank.nn import cache_bytes
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize

PREFIX, CHUNK, SINGLE = 512, 160, 32  # of a window of 1,024: prefill, three chunks, one by one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--kv-keep", type=float, default=0.5)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8176])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    source = parse_source(options.model)
    tokenizer = load_tokenizer(source)
    ids = tokenize(tokenizer, read_text(CalibrationRecipe(source=(options.test,))))
    dense, latent = load_model(source), load_model(source)
    recipe = CompressionRecipe.from_dict(
        {"budget": {"param_ratio": 1.0}, "kv_cache": {"keep": options.kv_keep}}
    )
    report = compress(latent, recipe, tokenizer=tokenizer, profile=options.profile)
    settings = {
        "model": Path(options.model).name,
        "calibration_fingerprint": report.calibration_fingerprint,
        "test": Path(options.test).name,
        "kv_keep": options.kv_keep,
        "keep": 1,
    }
    assert report.kv_cache is not None
    results: dict[str, Any] = {
        "kv_cache": report.kv_cache.model_dump(),
        "size": report.size.model_dump(),
        "warnings": report.warnings,
        "perplexity": perplexities(dense, latent, ids, options),
    }
    _record.write(options.out, 0, settings, results)
    for dtype in ("float32", "bfloat16"):
        models = {
            name: model.to(getattr(torch, dtype))
            for name, model in (("dense", dense), ("latent", latent))
        }
        results[dtype] = {
            str(context): at_context(models, ids[:context], options) for context in options.contexts
        }
        _record.write(options.out, 0, settings, results)


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")


@torch.no_grad()
def perplexities(
    dense: Any, latent: Any, ids: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Dense; latent without a cache; latent through its cache, in chunks and token by token."""
    length, sums = options.sequence_length, {"dense": 0.0, "no cache": 0.0, "cached": 0.0}
    worst = 0.0
    for number in range(options.num_windows):
        window = ids[None, number * length : (number + 1) * length]
        sums["dense"] += float(loss(dense(window, use_cache=False).logits, window))
        plain = latent(window, use_cache=False).logits
        cache = DynamicCache(config=latent.config)
        pieces, start = [], 0
        sizes = [PREFIX, *[CHUNK] * ((length - PREFIX - SINGLE) // CHUNK), *[1] * SINGLE]
        for size in sizes:
            piece = window[:, start : start + size]
            pieces.append(latent(piece, past_key_values=cache, use_cache=True).logits)
            start += size
        cached = torch.cat(pieces, dim=1)
        plain, window = plain[:, :start], window[:, :start]
        sums["no cache"] += float(loss(plain, window))
        sums["cached"] += float(loss(cached, window))
        worst = max(worst, float((plain - cached).abs().max()))
    tokens = options.num_windows * (length - 1)
    seen = options.num_windows * (start - 1)
    return {
        "windows": options.num_windows,
        "dense": math.exp(sums["dense"] / tokens),
        "latent, no cache": math.exp(sums["no cache"] / seen),
        "latent, cached": math.exp(sums["cached"] / seen),
        "largest difference of a logit": worst,
        "pieces of a window": sizes,
    }


@torch.no_grad()
def at_context(models: dict[str, Any], ids: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the cache, and milliseconds a token, behind a context."""
    caches: dict[str, Any] = {}
    found: dict[str, Any] = {name: {} for name in models}
    for name, model in models.items():
        caches[name] = DynamicCache(config=model.config)
        start = time.perf_counter()
        for piece in ids[None].split(1024, dim=1):
            model(piece, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
        found[name]["prefill_seconds"] = time.perf_counter() - start
        found[name]["cache_bytes"] = cache_bytes(caches[name])
    times: dict[str, list[float]] = {name: [] for name in models}
    token = ids[None, -1:]
    for _ in range(options.rounds):
        for name, model in models.items():
            for _ in range(options.steps):
                start = time.perf_counter()
                model(token, past_key_values=caches[name], use_cache=True)
                times[name].append(1000 * (time.perf_counter() - start))
            caches[name].crop(-options.steps)
    for name, values in times.items():
        values.sort()
        found[name]["decode_ms_median"] = values[len(values) // 2]
        found[name]["decode_ms_range"] = [values[0], values[-1]]
    found["cache_bytes_ratio"] = found["latent"]["cache_bytes"] / found["dense"]["cache_bytes"]
    found["decode_ratio"] = found["latent"]["decode_ms_median"] / found["dense"]["decode_ms_median"]
    return found


if __name__ == "__main__":
    main()
