"""Tables of the docs, from the committed results: cog writes them, `make docs` checks them."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = {"dense": "dense", "swift-svd": "`swift-svd`", "svd-llm": "`svd-llm`"}


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


def objectives() -> None:
    """Four objectives, unrefined and refined, beside the paper's table 5."""
    record = read("objectives")
    base = record["settings"]["base"]
    names = {"svd": "1 `svd`", "swift-svd": "2 `swift-svd`", "shift-aware": "3 `shift-aware`"}
    names["aa-svd"] = "4 `aa-svd`"
    papers = {
        ("svd", 0.8): ("2e4", "7.35"),
        ("swift-svd", 0.8): ("7.89", "6.89"),
        ("shift-aware", 0.8): ("8.22", "7.28"),
        ("aa-svd", 0.8): ("7.68", "7.08"),
        ("svd", 0.6): ("5e5", "10.93"),
        ("swift-svd", 0.6): ("13.11", "8.35"),
        ("shift-aware", 0.6): ("14.87", "8.54"),
        ("aa-svd", 0.6): ("12.19", "8.52"),
    }
    header("kept, objective", "unrefined", "refined", "other text: unrefined", "refined", "paper")
    for keep in (0.8, 0.6, 0.4):
        for method, name in names.items():
            found = [_perplexities(record, keep, method, refined) for refined in (False, True)]
            if not any(found):
                continue
            row(
                f"{keep}, {name}",
                *(_spread([x["test"] for x in values]) for values in found),
                *(_spread([x["other"] for x in values]) for values in found),
                " / ".join(papers.get((method, keep), ("-",))),
            )
    dense = next(x for x in record["results"] if x["wanted"] == "dense")["perplexity"]
    print()
    print(
        f"SmolLM2-135M, calibrated on {base['sequences']} x {base['length']} tokens of Wikipedia "
        "prose and 8 sequences held out; refined: the paper's settings with 10\nepochs. Perplexity "
        "on all of the WikiText-2 test split in windows of 1,024 tokens, and on a manual of a "
        f"programming language (dense {dense['test']:.2f} and {dense['other']:.2f}).\nMean over "
        "seeds, and the smallest and largest where there are several. The paper's column is "
        "LLaMA-7B on WikiText-2, its calibration domain\n"
        "([figures](../benchmarks/results/objectives.json), in float32 on a GPU)."
    )


def better() -> None:
    """The short version, for the README."""
    record = read("objectives")
    paper = {"preset": "paper", "epochs": 10}
    fast = {"preset": "fast", "learning_rate": 3e-4, "batch_sequences": 8, "epochs": 8}
    header("SmolLM2-135M, keep 0.8", "WikiText-2 test", "text of another kind")
    for name, keys in (
        ("`swift-svd`", {"method": "swift-svd", "refine": "off", "within_block": None}),
        ("`aa-svd`", {"method": "aa-svd", "refine": "off", "ridge": 0.1}),
        ("`aa-svd`, refined, 10 epochs of `paper`", {"ridge": 0.1, "refine": paper}),
        ("`swift-svd`, refined by `fast`", {"method": "swift-svd", "refine": fast}),
    ):
        same = {"keep": 0.8, "seed": 0, "sequences": 32, "allocation": None}
        for found in _matching(record, {**same, **keys}):
            row(name, *(f"{found['perplexity'][text]:.0f}" for text in ("test", "other")))
    base = record["settings"]["base"]
    print()
    print(
        f"Perplexity; calibrated on {base['sequences']} sequences of {base['length']} tokens, a "
        "quarter of the tokens of the table above; one seed\n"
        "([all figures](benchmarks/results/objectives.json))."
    )


def settings() -> None:
    """Other settings at 0.8: the ridge of the first runs, shared-out ranks, the fast preset."""
    record = read("objectives")
    header("0.8 kept, 32 x 512 tokens, seed 0", "unseen calibration text", "WikiText-2", "other")
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("`swift-svd`", {"method": "swift-svd", "refine": "off", "within_block": None}),
        ("`swift-svd`, within-block greedy", {"within_block": "greedy"}),
        ("`aa-svd`, ridge 0.01", {"method": "aa-svd", "refine": "off", "ridge": None}),
        ("`aa-svd`, ridge 0.1", {"method": "aa-svd", "refine": "off", "ridge": 0.1}),
    ]
    for name, keys in wanted:
        _settings_row(record, name, keys)
    fast = {"preset": "fast", "batch_sequences": 8, "epochs": 8}
    paper = {"method": "swift-svd", "refine": {"preset": "paper", "epochs": 10}}
    _settings_row(record, "`swift-svd`, refine paper, 10 epochs (10 steps)", paper)
    for rate in (3e-4, 1e-3):
        name = f"`swift-svd`, refine fast, rate {rate:g} (8 epochs, 32 steps)"
        _settings_row(record, name, {"refine": {**fast, "learning_rate": rate}})


def training() -> None:
    """What refinement gives by epochs, tokens and what it trains, and what it takes."""
    record = read("objectives")
    fast = {"preset": "fast"}
    chosen = {**fast, "learning_rate": 3e-4, "batch_sequences": 8, "epochs": 8}
    header(
        "0.8 kept, `swift-svd`",
        "held-out loss",
        "unseen calibration text",
        "WikiText-2",
        "other",
        "training, s",
    )
    unrefined = {"method": "swift-svd", "refine": "off", "within_block": None, "allocation": None}
    base = {"sequences": 32, "length": 512}
    rows: list[tuple[str, dict[str, Any]]] = [("32 x 512, unrefined", {**unrefined, **base})]
    for epochs in (1, 2, 4, 8, 16):
        how = chosen if epochs == 8 else {**fast, "epochs": epochs}
        rows.append((f"32 x 512, {epochs} epochs", {**base, "refine": how}))
    for count, epochs in ((64, 4), (128, 2), (128, 8)):
        how = {**fast, "epochs": epochs}
        rows.append((f"{count} x 512, {epochs} epochs", {"sequences": count, "refine": how}))
    for part in ("factors", "norms"):
        how = {**fast, "trains": [part]}
        rows.append((f"32 x 512, 8 epochs, {part} alone", {**base, "refine": how}))
    large = {"sequences": 64, "length": 1024}
    rows.append(("64 x 1,024, unrefined", {**unrefined, **large}))
    rows.append(("64 x 1,024, `paper`, 25 epochs", {**large, "refine": "paper"}))
    for name, keys in rows:
        wanted = {"method": "swift-svd", "within_block": None, "allocation": None, **keys}
        for found in _matching(record, {"keep": 0.8, "seed": 0, **wanted}):
            row(name, *_training_cells(found))
    for refine, name in (("off", "unrefined"), ("paper", "`paper`, 25 epochs")):
        for found in _matching(record, {"method": "aa-svd", "refine": refine, **large}):
            row(f"64 x 1,024, `aa-svd`, {name}", *_training_cells(found))


def _training_cells(found: dict[str, Any]) -> list[str]:
    trained = [block for block in found["blocks"] if "held_out_losses" in block]
    ratio = [
        min(b["start_held_out_loss"], *b["held_out_losses"]) / b["start_held_out_loss"]
        for b in trained
    ]
    return [
        f"{sum(ratio) / len(ratio):.3f}" if ratio else "-",
        *(f"{value:.1f}" for value in found["perplexity"].values()),
        f"{found['phases']['refine']:.0f}" if trained else "-",
    ]


def ranks() -> None:
    """Recipes A and B, and both, against uniform ranks."""
    record = read("objectives")
    header("0.8 kept", "unrefined: WikiText-2", "other", "refined by `fast`: WikiText-2", "other")
    chosen = {"preset": "fast", "learning_rate": 3e-4, "batch_sequences": 8, "epochs": 8}
    for method, size in (("swift-svd", None), ("aa-svd", 0.1)):
        for name, allocation, within in (
            ("uniform", "uniform", "fixed"),
            ("A: `swift` from the dense pass", "swift", "fixed"),
            ("B: greedy within blocks", "uniform", "greedy"),
            ("A and B", "swift", "greedy"),
        ):
            cells: list[str] = []
            for kinds in (("off",), ("fast", chosen)):
                same = {"keep": 0.8, "seed": 0, "sequences": 32, "length": 512, "method": method}
                found = [
                    x["perplexity"]
                    for x in _matching(record, {**same, "ridge": size})
                    if x["wanted"]["refine"] in kinds
                    and x["wanted"].get("allocation", "uniform") == allocation
                    and x["wanted"].get("within_block", "fixed") == within
                ]
                cells += [f"{found[0][t]:.1f}" if found else "-" for t in ("test", "other")]
            row(f"`{method}`, {name}", *cells)


def ridge() -> None:
    """Ridge against tokens, by perplexity on calibration text that no run has seen."""
    found = read("ridge")["results"]
    values = {
        (x["wanted"]["keep"], x["wanted"]["sequences"], x["wanted"]["ridge"]): x["perplexity"]
        for x in found
    }
    sizes = sorted({size for _, _, size in values})
    header("kept, sequences of 512", *(f"{size:g}" for size in sizes))
    for keep, count in sorted({(k, c) for k, c, _ in values}, key=lambda x: (-x[0], x[1])):
        cells = [values.get((keep, count, size)) for size in sizes]
        row(
            f"{keep}, {count}",
            *(f"{x['unseen_calibration_text']:.1f}" if x else "" for x in cells),
        )


def sequence() -> None:
    """Time and memory of the phases of a sequential run."""
    record = read("sequence")
    header(
        "seconds",
        "plain forward",
        "both streams",
        "ratio",
        "solves",
        "refinement",
        "whole run",
        "peak, GB",
    )
    for name, entry in record["results"].items():
        said, phases = entry["summary"], entry["phases"]
        row(
            _sequence_name(name),
            f"{said['plain_forward_seconds']:.1f}",
            f"{said['passes_seconds']:.1f}",
            f"{said['passes_over_forward']:.1f}, "
            f"{said['passes_over_forward_of_all_sequences']:.1f}",
            f"{said['solve_seconds']:.0f}",
            f"{phases['refine']:.0f}" if "refine" in phases else "-",
            f"{said['seconds']:.0f}",
            f"{max(entry['peak_resident_bytes_by_phase'].values()) / 1e9:.2f}",
        )


def streaming() -> None:
    """Memory of streamed runs above what their imports take."""
    header(
        "hidden, intermediate, blocks",
        "model on disk, GB",
        "peak above imports, GB",
        "until the first block is done",
        "in the others",
        "while OUT is written",
        "minutes",
    )
    stages = (
        "peak",
        *(f"peak_{x}" for x in ("until_first_block_is_done", "in_blocks", "in_writing")),
    )
    for file, name in (("streaming", "deep"), ("streaming-wide", "wide")):
        record = read(file)
        entry, base = record["results"][name], record["results"]["memory_after_imports"]
        assert entry["exit_code"] == 0
        row(
            ", ".join(map(str, record["settings"]["shapes"][name][:3])),
            f"{entry['model_bytes'] / 1e9:.2f}",
            *(f"{(entry[x] - base) / 1e9:.2f}" for x in stages),
            f"{entry['seconds'] / 60:.0f}",
        )


def _sequence_name(name: str) -> str:
    method, how = name.split(", ")
    return f"`{method}`, {how.replace('refine fast', 'refined by `fast`')}"


def refinement() -> None:
    """Held-out loss and seconds by epoch, over all blocks of the refined run."""
    found = next(e for name, e in read("sequence")["results"].items() if "refine fast" in name)
    trained = [block["refinement"] for block in found["blocks"]]
    count = max(len(one["epochs"]) for one in trained)
    header("epoch", *map(str, range(1, count + 1)))
    at = [[one["epochs"][min(n, len(one["epochs"]) - 1)] for one in trained] for n in range(count)]
    starts = [one["start_held_out_loss"] for one in trained]
    losses = [
        sum(e["held_out_loss"] / s for e, s in zip(epochs, starts, strict=True)) / len(starts)
        for epochs in at
    ]
    row("held-out loss", *(f"{loss:.3f}" for loss in losses))
    row("seconds", *(f"{sum(e['seconds'] for e in epochs):.0f}" for epochs in at))


def _perplexities(record: Any, keep: float, method: str, refined: bool) -> list[dict[str, float]]:
    size = 0.1 if method == "aa-svd" else None
    how = {"preset": "paper", "epochs": 10} if refined else "off"
    wanted = {"keep": keep, "method": method, "ridge": size, "refine": how, "sequences": 32}
    found = _matching(record, {**wanted, "within_block": None, "allocation": None})
    return [x["perplexity"] for x in found]


def _matching(record: Any, wanted: dict[str, Any]) -> list[Any]:
    return [
        x
        for x in record["results"]
        if x["wanted"] != "dense" and all(x["wanted"].get(k) == v for k, v in wanted.items())
    ]


def _settings_row(record: Any, name: str, keys: dict[str, Any]) -> None:
    same = {"keep": 0.8, "seed": 0, "sequences": 32, "length": 512, "allocation": None}
    for found in _matching(record, {**same, **keys}):
        row(name, *(f"{value:.1f}" for value in found["perplexity"].values()))


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    text = f"{mean:.0f}" if mean < 1e5 else f"{mean:.1e}"
    return text if len(values) == 1 else f"{text} ({min(values):.0f} to {max(values):.0f})"


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
