"""Tables of the docs, from the committed results: cog writes them, `make docs` checks them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = {"dense": "dense", "swift-svd": "`swift-svd` (default)", "svd-llm": "`svd-llm`"}


def quality() -> None:
    """Perplexity and bytes of each method."""
    record = read("quality")
    found, settings = record["results"], record["settings"]
    header("SmolLM2-135M", "kept: linears / model", "MB on disk", "perplexity")
    for name in ("dense", "swift-svd", "svd-llm", "svd"):
        size = found["swift-svd" if name == "dense" else name]["size"]
        value = found[name]["wikitext2_test"]["value"]
        after = "_before" if name == "dense" else ""
        kept = [
            size[f"{x}_params{after}"] / size[f"{x}_params_before"] for x in ("target", "model")
        ]
        row(
            METHODS.get(name, f"`{name}`"),
            " / ".join(f"{100 * share:.1f} %" for share in kept),
            f"{size[f'weight_bytes{after}'] / 1e6:.1f}",
            f"{value:.1f}" if value < 1e4 else f"{value:.1e}",
        )
    print()
    tokens = found["dense"]["wikitext2_test"]["tokens"]
    print(
        f"Weights dequantised from 4 bits, float32; calibrated on {settings['num_sequences']} "
        f"sequences of {settings['sequence_length']:,} tokens of Wikipedia\nprose; perplexity on "
        f"all {tokens:,} predictions of the WikiText-2 test split, in windows of 1,024 tokens\n"
        "([all figures](benchmarks/results/quality.json), [speed](benchmarks/results/speed.json))."
    )


def sizes() -> None:
    """Seconds of a first size and of further ones."""
    record = read("sizes")
    found, settings = record["results"], record["settings"]
    ours, theirs = found["swift-svd"], found["svd-llm"]
    cached = theirs["further_size_seconds_whitening_cached"]
    each = found["per-sample svd, EXTRAPOLATED"]["extrapolated_seconds_of_one_size"]
    one = theirs["size_seconds"]
    header("seconds", "first size", "each further size")
    further = f"{ours['further_size_seconds']:.1f}"
    row("profile, then sizes from it", f"{ours['first_size_seconds']:.0f}", further)
    row("`svd-llm`, nothing cached", f"{one:.0f}", f"{one:.0f}")
    row("`svd-llm`, whitening cached", f"{one:.0f}", f"{cached:.0f}")
    row("truncated SVD of each sample, EXTRAPOLATED", f"{each:,.0f}", f"{each:,.0f}")
    print()
    header("times as fast as", "1 size", "3 sizes", "6 sizes")
    for name in found["ratios"]["1 sizes"]:
        row(name, *(f"{found['ratios'][f'{n} sizes'][name]:.1f}" for n in (1, 3, 6)))
    row("the paper's, against `svd-llm` not cached (a 7B, a GPU)", "1.6 to 2.0", "up to 3.8", "")
    print()
    print(
        f"SmolLM2-135M, {settings['num_sequences']} sequences of {settings['sequence_length']:,} "
        f"tokens, {record['environment']['threads']} threads of a shared machine, one run. Each "
        "size is loaded, written, read\nback and compared. A further size costs "
        f"{ours['further_over_first']:.1%} of the first. The profile has "
        f"{ours['profile_bytes'] / 1e6:.0f} MB ([figures](../benchmarks/results/sizes.json))."
    )


def allocation() -> None:
    """Dynamic against uniform ranks, and the curves of alpha."""
    found = {k: e for k, e in read("allocation")["results"].items() if "gain" in e}
    header("kept", "uniform", "dynamic", "gain", "α", "parameters, uniform and dynamic")
    for keep, entry in found.items():
        even, dynamic = entry["uniform"], entry["swift"]
        row(
            keep,
            f"{even['test']['value']:.2f}",
            f"{dynamic['test']['value']:.2f}",
            f"{entry['gain']:+.1%}",
            f"{dynamic['allocation']['importance_weight']:g}",
            f"{even['target_params']:,}, {dynamic['target_params']:,}",
        )
    first = next(iter(found.values()))
    test, held = first["uniform"]["test"], first["swift"]["allocation"]
    print()
    print(
        f"SmolLM2-135M; perplexity on the first {test['windows']} windows of "
        f"{test['sequence_length']:,} tokens of the WikiText-2 test split. α was chosen on\n"
        f"{held['held_out_tokens']:,} held-out tokens of the calibration text; perplexity there, "
        "by α ([figures](../benchmarks/results/allocation.json)):"
    )
    print()
    header("kept", *(f"{trial['importance_weight']:g}" for trial in held["trials"]), "uniform")
    for keep, entry in found.items():
        chosen = entry["swift"]["allocation"]
        values = [trial["perplexity"] for trial in chosen["trials"]]
        row(keep, *(f"{value:.2f}" for value in (*values, chosen["uniform_perplexity"])))


def analysis() -> None:
    """Effective rank by module type, and its correlation with importance."""
    found = read("analysis")["results"]
    header(
        "SmolLM2-135M",
        "mean effective rank",
        "normalised",
        "with importance: Pearson and Spearman",
        "without the outermost blocks",
    )
    for kind in found["kinds"]:
        row(
            f"`{kind['kind']}`",
            f"{kind['mean_effective_rank']:.0f}",
            f"{kind['mean_normalized_effective_rank']:.3f}",
            *coefficients(kind["correlations"]),
        )
    row("mean of all", "", "", *coefficients(found["overall"]))
    *others, last = found["importance"]
    print()
    print(
        f"Importance of the last block: {last:.3f} before the final norm, "
        f"{found['importance_after_norm']:.3f} behind it; mean of the others "
        f"{sum(others) / len(others):.3f}\n([figures](../benchmarks/results/analysis.json))."
    )


def kv_cache() -> None:
    """The cache of latents against a dense one."""
    record = read("kv_cache")
    found = record["results"]
    seen = found["perplexity"]
    print(
        f"SmolLM2-135M, `--keep 1 --kv-keep {record['settings']['kv_keep']:g}`, against the true "
        f"dense model with transformers' own cache; one run,\n{record['environment']['threads']} "
        "threads of a shared machine ([figures](../benchmarks/results/kv_cache.json))."
    )
    print()
    print(
        f"Perplexity on {seen['windows']} windows of WikiText-2 test: dense {seen['dense']:.3f}; "
        f"latent without a cache {seen['latent, no cache']:.5f}, through\nthe cache, in chunks and "
        f"token by token, {seen['latent, cached']:.5f} (largest difference of a logit: "
        f"{seen['largest difference of a logit']:.1e})."
    )
    print()
    header("dtype, context", "MB: dense", "latent", "ratio", "ms a token: dense", "latent", "ratio")
    for dtype in ("float32", "bfloat16"):
        for context, entry in found.get(dtype, {}).items():
            sides = entry["dense"], entry["latent"]
            row(
                f"{dtype}, {int(context):,}",
                *(f"{side['cache_bytes'] / 1e6:.1f}" for side in sides),
                f"{entry['cache_bytes_ratio']:.3f}",
                *(f"{side['decode_ms_median']:.0f}" for side in sides),
                f"{entry['decode_ratio']:.2f}",
            )


def coefficients(found: dict[str, Any]) -> list[str]:
    """Both coefficients with their p-values, of all blocks and of the inner ones."""
    return [
        one["reason"]
        or " and ".join(f"{one[k]['value']:+.2f} (p {one[k]['p_value']:.1g})" for k in kinds)
        for kinds in [("pearson", "spearman")]
        for one in (found["all_blocks"], found["inner_blocks"])
    ]


def read(name: str) -> Any:
    """Read a result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def header(*cells: str) -> None:
    """Begin a table."""
    row(*cells)
    row(*["---"] * len(cells))


def row(*cells: str) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |")
