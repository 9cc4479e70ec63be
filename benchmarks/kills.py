"""Runs that are killed at random moments and resumed: and what they end in.

    python benchmarks/kills.py --kills 100 --seed 0 --out results/kills.json

A tiny model is compressed by the command line, by the default recipe and by `aa-svd`, block after
block. Each process is killed after a time drawn evenly from that of an unbroken run, and the same
command goes on, until so many have been killed in either order. Processes are forked from one that
has imported everything, so that no kill is spent on imports.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import statistics
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import _record
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimrank.calibration import packaged_text
from slimrank.checkpoint import state_folder
from slimrank.cli import app

CHARACTERS = string.ascii_letters + string.digits + " \n.,;:'\"()-!?%&/"
MODEL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SMALL = ["--keep", "0.5", "--num-sequences", "24", "--sequence-length", "64"]
ALL_DONE = "all is done"
ORDERS = {"one-shot": [], "sequential": ["--method", "aa-svd"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in either order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--orders", nargs="*", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(fork(lambda: write_model(folder), folder / "log"), folder / "log")
        for order in options.orders:
            draw = random.Random(f"{order} {options.seed}")
            results[order] = kill_and_resume(folder, ORDERS[order], options.kills, draw)
    settings = {"kills": options.kills, "model": MODEL, "arguments": [*SMALL, "--resume"]}
    _record.write(options.out, options.seed, settings, results, quiet=True)
    for order, found in results.items():
        print(order, {key: x for key, x in found.items() if key not in ("kills", "sha256")})
    if not all(found["same_bytes"] and found["nothing_else"] for found in results.values()):
        sys.exit("not every run ended as the unbroken one")


def kill_and_resume(
    folder: Path, more: list[str], count: int, draw: random.Random
) -> dict[str, Any]:
    """Kill so many processes; say where that was, and what the runs ended in."""
    place = folder / "out"
    out, log = place / "small", folder / "log"
    flags = [*SMALL, "--calibration", str(folder / "text.txt"), "--resume", *more]
    arguments = ["compress", str(folder / "model"), str(out), *flags]

    def command() -> None:
        app(arguments)

    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        finish(fork(command, log), log)
        times.append(time.perf_counter() - start)
        expected, files = ended(place)
    seconds = statistics.median(times)
    kills: list[dict[str, Any]] = []
    ends: list[str] = []
    is_alone, survived = files == ["small"], []
    since = 0
    while len(kills) < count or since:
        delay = draw.uniform(0, seconds) if len(kills) < count else 60 * seconds + 60
        process = fork(command, log)
        if is_killed(process, delay, log):
            kills.append({"after_seconds": delay, **what_is_kept(out)})
            since += 1
            if kills[-1]["where"] != ALL_DONE:
                continue
        digest, files = ended(place)
        ends.append(digest)
        is_alone = is_alone and files == ["small"]
        survived.append(since)
        since = 0
    return {
        "unbroken_seconds": seconds,
        "killed": len(kills),
        "where": dict(Counter(kill["where"] for kill in kills)),
        "runs_ended": len(ends),
        "kills_survived": survived,
        "same_bytes": set(ends) == {expected},
        "nothing_else": is_alone,
        "sha256": {"unbroken": expected, "ended": ends},
        "kills": kills,
    }


def fork(work: Callable[[], None], log: Path) -> int:
    """Do some work in a process of its own; give its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_killed(process: int, delay: float, log: Path) -> bool:
    """Kill a process after a while; tell whether it had not ended by then."""
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            require_success(status, log)
            return False
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    require_success(status, log)
    return False


def finish(process: int, log: Path) -> None:
    """Wait for a process."""
    require_success(os.waitpid(process, 0)[1], log)


def require_success(status: int, log: Path) -> None:
    if status:
        sys.exit(f"a run failed with status {status}: {log.read_text()[-2000:]}")


def what_is_kept(out: Path) -> dict[str, Any]:
    """Where a kill fell, by what it left."""
    state = state_folder(out)
    profiled = len(list((state / ".profile.unfinished").glob("block-*.json")))
    blocks = len(list(state.glob("block-*.json")))
    if out.exists():
        where = "the folder stands" if state.exists() else ALL_DONE
    elif any(state.glob(f".{out.name}.partial-*")):
        where = "the folder is written"
    elif blocks:
        where = f"{blocks} blocks are finished"
    elif (state / "profile").exists():
        where = "all blocks are profiled"
    elif profiled:
        where = f"{profiled} blocks are profiled"
    else:
        where = "begun" if (state / "run.json").exists() else "nothing is kept"
    return {"where": where, "blocks_finished": blocks, "blocks_profiled": profiled}


def ended(place: Path) -> tuple[str, list[str]]:
    """Hash of what a finished run has written as weights, and all that lies there; both go."""
    digest = hashlib.sha256()
    for path in sorted((place / "small").glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    files = sorted(path.name for path in place.iterdir())
    shutil.rmtree(place)
    return digest.hexdigest(), files


def write_model(folder: Path) -> None:
    """A model of random weights, a tokenizer of characters, and a text."""
    known = {token: number for number, token in enumerate(("<unk>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    config = LlamaConfig(
        **MODEL, vocab_size=len(known), num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                scale = parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(packaged_text("calibration")[:20000], encoding="utf-8")


if __name__ == "__main__":
    main()
