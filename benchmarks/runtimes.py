"""Tokens a second of a dense model and of its compressed folders, in each runtime that takes them.

    python benchmarks/runtimes.py dense=MODEL plain=OUT-A pivoted=OUT-B int8=OUT-C --work DIR \
        --out results/runtimes.json

The first folder is what the others are held against. Each is exported once, to DIR. All candidates
are loaded beside each other and take turns; the first turn does not count, and is held against
transformers. Prefill is one call on a prompt, decode one call for each token after it. Medians over
all turns and their ratios are quoted, all by the CPU on the same cores.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _record
import torch
from torch import Tensor
from transformers import DynamicCache

from slimrank import load
from slimrank.checkpoint import weight_file_bytes
from slimrank.exporting import GRAPHS
from slimrank.exporting.traceable import make_traceable

FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
WEIGHTS = {"onnx": "model.onnx_data", "openvino": "openvino_model.bin"}
NEAR = {"f32": 1e-3, "bf16": 0.2}  # logits, to the largest
PAUSE = 0.05  # threads of the candidate before may be waiting for more work, awake

Call = Callable[[Tensor], Tensor]  # a prompt begins anew, one token goes on; gives the last logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runtimes", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="f32", choices=list(NEAR))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    named = dict(pair.split("=", 1) for pair in options.folders)
    candidates, sizes = {}, {}
    for name, folder in named.items():
        for runtime in options.runtimes:
            place = (
                Path(folder) if runtime == "transformers" else exported(folder, runtime, options)
            )
            candidates[name, runtime] = STARTS[runtime](place, options)
            sizes[f"{name}, {runtime}"] = weight_bytes(place, runtime)
    draw = torch.Generator().manual_seed(options.seed)
    results = [measured(batch, candidates, options, draw) for batch in options.batches]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "work")}
    settings["versions"] = {name: version(name) for name in ("openvino", "onnxruntime")}
    settings["folders"] = {name: Path(folder).name for name, folder in named.items()}
    _record.write(options.out, options.seed, settings, {"weight_bytes": sizes, "speeds": results})


def exported(folder: str, runtime: str, options: argparse.Namespace) -> Path:
    """The graph of a folder, dense ones too; made if it is not there."""
    place: Path = options.work / f"{Path(folder).name}-{runtime}"
    if not (place / FILES[runtime]).exists():
        place.mkdir(parents=True, exist_ok=True)
        model = load(folder, dtype="auto")
        make_traceable(model)
        GRAPHS[runtime].write(GRAPHS[runtime].trace(model), place)
    return place


def weight_bytes(place: Path, runtime: str) -> int:
    if runtime == "transformers":
        return weight_file_bytes(place)
    return (place / WEIGHTS[runtime]).stat().st_size


def measured(
    batch: int,
    candidates: dict[tuple[str, str], Call],
    options: argparse.Namespace,
    draw: torch.Generator,
) -> dict[str, Any]:
    """Tokens a second of each candidate, and what they are of the first folder's there."""
    ids = torch.randint(4, 90, (batch, options.prompt + options.new), generator=draw)
    prompt, following = ids[:, : options.prompt], ids[:, options.prompt :].split(1, dim=1)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in candidates}
    last: dict[tuple[str, str], Tensor] = {}
    for _ in range(options.rounds + 1):
        for key, call in candidates.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call(prompt)
            middle = time.perf_counter()
            for token in following:
                last[key] = call(token)
            seconds[key].append((middle - start, time.perf_counter() - middle))
    require_near(last, NEAR[options.precision])
    tokens = batch * options.prompt, batch * options.new
    found: dict[str, Any] = {"batch": batch}
    for place, phase in enumerate(("prefill", "decode")):
        speeds = {
            key: tokens[place] / statistics.median(turn[place] for turn in turns[1:])
            for key, turns in seconds.items()
        }
        first = next(iter(candidates))[0]
        found[phase] = {
            f"{name}, {runtime}": {
                "tokens a second": speed,
                f"to {first}": speed / speeds[first, runtime],
                f"to {first} in {options.runtimes[0]}": speed / speeds[first, options.runtimes[0]],
            }
            for (name, runtime), speed in speeds.items()
        }
    print(found, flush=True)
    return found


def require_near(last: dict[tuple[str, str], Tensor], near: float) -> None:
    """Refuse to time what gives other logits than the folder's first runtime."""
    expected: dict[str, Tensor] = {}
    for (name, runtime), logits in last.items():
        reference = expected.setdefault(name, logits)
        apart = float((logits - reference).abs().max() / reference.abs().max())
        if not apart <= near:
            raise SystemExit(f"{name} in {runtime} is {apart:.1e} of the largest logit away")


def start_transformers(folder: Path, options: argparse.Namespace) -> Call:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = load(folder, dtype=dtype)
    caches = [DynamicCache()]

    def call(ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            caches[0] = DynamicCache(config=model.config)
        outputs = model(ids, past_key_values=caches[0])  # logits of all tokens, as graphs give
        logits: Tensor = outputs.logits[:, -1].float()
        return logits

    return call


def start_openvino(folder: Path, options: argparse.Namespace) -> Call:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": options.precision,
    }
    if options.precision == "f32":
        settings["KV_CACHE_PRECISION"] = "f32"
    model = openvino.Core().compile_model(folder / FILES["openvino"], "CPU", settings)
    request, seen = model.create_infer_request(), [0]

    def call(ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            request.reset_state()
            seen[0] = 0
        inputs = {name: t.numpy() for name, t in arguments(ids, seen).items()}
        inputs["beam_idx"] = torch.arange(len(ids), dtype=torch.int32).numpy()
        return torch.from_numpy(request.infer(inputs)["logits"][:, -1].copy())

    return call


def start_onnx(folder: Path, options: argparse.Namespace) -> Call:
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / FILES["onnx"], settings, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_outputs()]
    past = {each.name: each.shape for each in session.get_inputs() if "past" in each.name}
    value, cache, seen = onnxruntime.OrtValue.ortvalue_from_numpy, {}, [0]

    def call(ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            seen[0] = 0
            for name, (_, heads, _, width) in past.items():
                cache[name] = value(np.zeros((len(ids), heads, 0, width), np.float32))
        inputs = {name: value(t.numpy()) for name, t in arguments(ids, seen).items()}
        outputs = session.run_with_ort_values(names, inputs | cache)
        cache.update(zip(past, outputs[1:], strict=True))
        return torch.from_numpy(outputs[0].numpy()[:, -1].copy())

    return call


def arguments(ids: Tensor, seen: list[int]) -> dict[str, Tensor]:
    """What graphs take; `seen` counts the tokens so far."""
    positions = torch.arange(seen[0], seen[0] + ids.shape[1]).repeat(len(ids), 1)
    seen[0] += ids.shape[1]
    mask = torch.ones(len(ids), seen[0], dtype=torch.int64)
    return {"input_ids": ids.contiguous(), "attention_mask": mask, "position_ids": positions}


STARTS = {"transformers": start_transformers, "openvino": start_openvino, "onnx": start_onnx}

if __name__ == "__main__":
    main()
