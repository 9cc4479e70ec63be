"""Rows of a table: each is one compression in memory, and perplexities of three texts.

The texts are sequences of the calibration text that no run has seen (what settings are chosen by),
the test text, and a text of another kind. Several processes share the rows of a suite through a
folder, `--claims`; one on a CPU leaves refined rows to others. `--merge` puts their files together.
"""

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _record
import torch

from slimrank import CompressionRecipe, TokenWindows, compress
from slimrank.calibration import draw_windows, read_text
from slimrank.evaluation import (
    find_choice_tasks,
    perplexity,
    read_choice_tasks,
    windows_perplexity,
    zero_shot,
)
from slimrank.options import CompressionOptions
from slimrank.recipe import CalibrationRecipe
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize

UNSEEN = 24  # sequences of 1,024 tokens at the end of the calibration text, for choices
BASE = {"keep": 0.8, "seed": 0, "sequences": 32, "length": 512, "refine": "off", "layout": "plain"}


def is_refined(row: dict[str, Any]) -> bool:
    """Whether anything is trained."""
    return bool(row.get("refine", "off") != "off" or row.get("tune") is not None)


Suites = Mapping[str, Callable[[float | None], list[dict[str, Any]]]]


def main(suites: Suites, description: str | None) -> None:
    """Read the command line and measure the rows of one suite, in turn."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--test")
    parser.add_argument("--other")
    parser.add_argument("--num-windows", type=int)
    parser.add_argument("--questions", help="a folder of zero-shot tasks")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--eval-device")
    parser.add_argument("--claims", help="a folder that other processes know too")
    parser.add_argument("--ridge", type=float, help="of aa-svd; its own if left out")
    parser.add_argument("--known", help="a file of results: its rows are not measured again")
    parser.add_argument("--backwards", action="store_true", help="begin with the last row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after")
    parser.add_argument("--merge", nargs="+", help="files of shards")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    if options.merge:
        merge(options.merge, options.out)
        return
    source = parse_source(options.model)
    tokenizer, dense = load_tokenizer(source), load_model(source).to(options.device)
    ids = {
        name: tokenize(tokenizer, read_text(CalibrationRecipe(source=(getattr(options, name),))))
        for name in ("calibration", "test", "other")
    }
    settings = {
        **{name: Path(getattr(options, name)).name for name in ids},
        **{f"{n}_sha256": _sha(getattr(options, n)) for n in ids},
        "model": Path(options.model).name,
        "device": options.device,
        "gpu": torch.cuda.get_device_name() if options.device.startswith("cuda") else None,
        "num_windows": options.num_windows or "all",
        "suite": options.suite,
        "base": BASE,
        "text_that_settings_are_chosen_by": f"last {UNSEEN} sequences of 1,024 of calibration",
    }
    unseen = TokenWindows(tuple(ids["calibration"][-UNSEEN * 1024 :].split(1024)))
    ids["calibration"] = ids["calibration"][: -UNSEEN * 1024]
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    known = [] if options.known is None else json.loads(Path(options.known).read_text())["results"]
    seen = [plainly(row["wanted"]) for row in known]
    wanted = list(enumerate([*suites[options.suite](options.ridge), None]))
    for number, row in reversed(wanted) if options.backwards else wanted:
        is_heavy = row is not None and (
            is_refined(row) or row.get("passes", 1) > 1 or "generated_sequences" in row
        )
        if known and (row is None or plainly({**BASE, **row}) in seen):
            continue
        late = time.perf_counter() - start > options.seconds
        shared = options.claims is not None
        if late or (shared and is_heavy and options.device == "cpu"):
            continue
        if shared and not claimed(Path(options.claims) / f"{options.suite}-{number}"):
            continue
        rows.append(measure(row, dense, ids, unseen, options, tokenizer))
        print(json.dumps(rows[-1]["wanted"]), rows[-1].get("perplexity"), flush=True)
        _record.write(options.out, 0, settings, rows, quiet=True)


def plainly(wanted: Any) -> Any:
    """A row without the settings that are left to their defaults."""
    if not isinstance(wanted, dict):
        return wanted
    usual = {"damping": 1e-2, "passes": 1, "global_ranks": {"unit": "kfac"}}
    given = {
        k: v
        for k, v in {**BASE, **wanted}.items()
        if v is not None and v not in ("fixed", "uniform") and usual.get(k) != v
    }
    shifts = wanted["method"] in ("aa-svd", "shift-aware", "kfac-aa-svd")
    sequential = shifts or wanted.get("refine", "off") != "off"
    return {"order": "sequential", **given} if sequential else given


def claimed(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def measure(
    row: dict[str, Any] | None,
    dense: Any,
    ids: dict[str, torch.Tensor],
    unseen: TokenWindows,
    options: Any,
    tokenizer: Any,
) -> dict[str, Any]:
    wanted = None if row is None else {**BASE, **row}
    model = copy.deepcopy(dense)
    found: dict[str, Any] = {"wanted": wanted or "dense"}
    if wanted is not None:
        given = dict(wanted)
        keep, seed = given.pop("keep"), given.pop("seed")
        count, length = given.pop("sequences"), given.pop("length")
        # Held-out sequences come last, so the calibration ones are the same without them: a run
        # that has nothing to choose by would calibrate on them too.
        generator = torch.Generator().manual_seed(seed)
        windows = draw_windows(ids["calibration"], count + 8, length, generator)
        recipe = CompressionRecipe.from_dict(
            {
                "budget": {"param_ratio": keep},
                "calibration": {"num_sequences": count, "sequence_length": length, "seed": seed},
                **given,
            }
        )
        if not holds_out(recipe):
            windows = TokenWindows(windows.windows[:count])
        start = time.perf_counter()
        how = CompressionOptions(batch_size=options.batch_size)
        report = compress(model, recipe, windows=windows, options=how)
        found |= {
            "seconds": time.perf_counter() - start,
            "phases": report.seconds,
            "peak_bytes": report.peak_bytes,
            "target_params": report.size.target_params,
            "target_params_before": report.size.target_params_before,
            "tokens": report.tokens,
            "blocks": [block.model_dump() for block in report.blocks],
            "tuning": report.tuning.model_dump() if report.tuning else None,
            "allocation": report.allocation.model_dump() if report.allocation else None,
            "ranks": {x.name: x.rank for x in report.linears},
            "warnings": report.warnings,
            "worst_gap": max(abs(x.predicted_loss - x.measured_loss) for x in report.linears),
            "worst_token_check": max(x.token_check or 0.0 for x in report.linears),
        }
    model.to(options.eval_device or options.device)
    found["perplexity"] = {"unseen_calibration_text": windows_perplexity(model, unseen).value}
    if options.suite != "ridge":  # settings are not chosen by the test text
        for name in ("test", "other"):
            value = perplexity(model, ids[name], 1024, options.num_windows).value
            found["perplexity"][name] = value
    if options.questions:
        found["accuracy"] = accuracy(model, tokenizer, options.questions, options.limit)
    return found


def accuracy(model: Any, tokenizer: Any, folder: str, limit: int | None) -> dict[str, Any]:
    """Share of questions that are answered rightly, by task, with its standard error."""
    tasks = read_choice_tasks(folder, find_choice_tasks(folder), limit)
    found = zero_shot(model, tokenizer, tasks, batch_size=64)
    return {name: [result.accuracy, result.stderr] for name, result in found.items()}


def merge(files: list[str], out: str) -> None:
    """Put files together: the first says what they share; of blocks and ranks the gist stays."""
    records = [json.loads(Path(name).read_text()) for name in files]
    rows: list[dict[str, Any]] = []
    for record in records:
        where = {key: record[key] for key in ("date", "commit")}
        where["ran_on"] = f"{record['settings']['device']} ({record['settings']['gpu']})"
        rows += [{**where, **gist(row)} for row in record["results"]]
    whole = {**records[0], "results": rows}
    Path(out).write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")


def holds_out(recipe: CompressionRecipe) -> bool:
    chooses = recipe.allocation != "uniform" or recipe.tune is not None or recipe.passes == 2
    chooses |= recipe.generated_sequences > 0
    return chooses or recipe.is_sequential


def gist(row: dict[str, Any]) -> dict[str, Any]:
    """A row with errors and losses by block, rounded, and no ranks."""
    if "ranks" not in row:
        return row
    return {
        **{key: value for key, value in row.items() if key != "ranks"},
        "phases": _rounded(row["phases"]),
        "blocks": [_rounded(block_gist(block)) for block in row["blocks"]],
    }


def block_gist(block: dict[str, Any]) -> dict[str, Any]:
    errors = {k: v for k, v in block.items() if isinstance(v, dict) and "cosine_distance" in v}
    trained = block["refinement"]
    if trained is None:
        return errors
    return {
        **errors,
        "start_held_out_loss": trained["start_held_out_loss"],
        "held_out_losses": [epoch["held_out_loss"] for epoch in trained["epochs"]],
        "losses": [epoch["loss"] for epoch in trained["epochs"]],
        "kept_epoch": trained["kept_epoch"],
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.5g}") if isinstance(values, float) else values


def _sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
