"""What healing brings, and takes: perplexity and divergence by tokens and seconds.

    python benchmarks/heal.py MODEL --text FILE --test FILE --out results/heal.json

The start of the text calibrates, the rest of it heals; its held-out sequences are the same in all
rows, and the test text is another one. For each share that is kept the model is compressed once, to
a folder, and healed from it with each amount of text, and each way.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import torch

from slimrank import CompressionRecipe, HealRecipe, TokenWindows, compress, heal
from slimrank.calibration import draw_windows, read_text
from slimrank.evaluation import perplexity
from slimrank.options import CompressionOptions
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_tokenizer, open_model, parse_source, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--num-sequences", type=int, default=32, help="to calibrate on")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--amounts", type=int, nargs="+", default=[48, 192], help="sequences")
    parser.add_argument("--held-out", type=int, default=16, help="sequences")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="beside the default")
    parser.add_argument("--lora", type=int, help="rank; also heal by adapters")
    parser.add_argument("--test-length", type=int, default=1024)
    parser.add_argument("--num-windows", type=int, help="of the test text; all if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(parse_source(options.model))
    ids = {name: tokens_of(getattr(options, name), tokenizer) for name in ("text", "test")}
    windows = split(ids["text"], options)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    settings |= {name: Path(settings[name]).name for name in ("model", "text", "test")}
    settings |= {f"{name}_sha256": sha(getattr(options, name)) for name in ids}
    settings["fingerprints"] = {name: part.fingerprint() for name, part in windows.items()}
    results: dict[str, Any] = {"dense": tested(options.model, ids["test"], options)}
    for keep in options.keeps:
        results[str(keep)] = {}
        with tempfile.TemporaryDirectory() as place:
            for name, found in rows(Path(place), keep, windows, ids["test"], options):
                results[str(keep)][name] = found
                print(keep, name, found["perplexity"]["value"], found["seconds"], flush=True)
                _record.write(options.out, options.seed, settings, results, quiet=True)


def split(ids: torch.Tensor, options: argparse.Namespace) -> dict[str, TokenWindows]:
    """To calibrate on, to heal on, and to stop by: no token is in two of them."""
    length, last = options.sequence_length, max(options.amounts)
    start = (options.num_sequences + 8) * length  # compress holds 8 of these out
    generator = torch.Generator().manual_seed(options.seed)
    calibration = TokenWindows(ids[:start].split(length))
    drawn = draw_windows(ids[start:], last + options.held_out, length, generator).windows
    if len(drawn) < last + options.held_out:
        raise SystemExit(f"the text has {len(drawn)} sequences behind those to calibrate on")
    held_out = TokenWindows(drawn[last:])
    return {"calibration": calibration, "healing": TokenWindows(drawn[:last]), "held out": held_out}


def rows(
    place: Path,
    keep: float,
    windows: dict[str, TokenWindows],
    test: torch.Tensor,
    options: argparse.Namespace,
) -> Any:
    """The compressed model, and each healing of it."""
    small = place / "small"
    recipe = CompressionRecipe.from_dict(
        {"budget": {"param_ratio": keep}, "effort": options.effort, "dtype": "auto"}
    )
    start = time.perf_counter()
    how = CompressionOptions(device=options.device)
    report = compress(options.model, recipe, out=small, windows=windows["calibration"], options=how)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "size": report.size.model_dump()}
    yield "compressed", {**found, "perplexity": tested(small, test, options)}
    for amount in options.amounts:
        for name, values in ways(options).items():
            recipe = HealRecipe(
                held_out_sequences=options.held_out,
                epochs=options.epochs,
                batch_sequences=options.batch_sequences,
                seed=options.seed,
                **values,
            )
            text = windows["healing"].windows[:amount] + windows["held out"].windows
            out = place / f"{amount} {name}"
            start = time.perf_counter()
            healed = heal(small, out, recipe, windows=TokenWindows(text), device=options.device)
            seconds = time.perf_counter() - start
            yield (
                f"{amount} sequences, {name}",
                {
                    "seconds": seconds,
                    "report": healed.model_dump(mode="json", exclude={"source", "teacher"}),
                    "perplexity": tested(out, test, options),
                },
            )


def ways(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings that differ between rows."""
    found: dict[str, dict[str, Any]] = {"factors": {}}
    found |= {f"factors, rate {rate:g}": {"learning_rate": rate} for rate in options.rates}
    if options.lora is not None:
        found[f"adapters of rank {options.lora}"] = {"lora_rank": options.lora}
    return found


def tested(model: str | Path, ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on the test text."""
    loaded = open_model(parse_source(model), device=options.device)
    return perplexity(loaded, ids, options.test_length, options.num_windows).model_dump()


def tokens_of(path: str, tokenizer: Any) -> torch.Tensor:
    return tokenize(tokenizer, read_text(CalibrationRecipe(source=(path,))))


def sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
