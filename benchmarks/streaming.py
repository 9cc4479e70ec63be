"""Models larger than the memory that a streamed run is given: what it takes, and for how long.

    python benchmarks/streaming.py --cgroup DIR --out results/streaming.json

Random Llamas in bfloat16 are written to disk, shard by shard, and compressed by the command line in
a process of its own, under a hard limit: what its imports alone take, and `--room` bytes more. DIR
is a memory cgroup, of either version, that the user has made; without it nothing is limited and
peaks are only measured. Files are dropped from the page cache first, so that the group pays for
what is read. A small model of the same family is compressed with `--stream` and without, and the
weights are compared.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import _record
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimrank.calibration import packaged_text
from slimrank.checkpoint import state_folder

VOCABULARY = 128_256
SHAPES = {  # hidden, intermediate, blocks, vocabulary
    "deep": (1024, 2816, 112, VOCABULARY),
    "wide": (2048, 5632, 8, VOCABULARY),
    "small": (256, 704, 4, 1024),
}
RECIPE = ["--keep", "0.6", "--method", "swift-svd", "--allocation", "uniform"]
TEXT = ["--num-sequences", "8", "--sequence-length", "128"]
CHARACTERS = 50_000  # of the packaged text, a token each
STREAM = ["--stream", "--memory", "0"]
IMPORTS = """
import slimrank.cli, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama
print(open("/proc/self/status").read())
"""
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
EVERY = 0.1  # seconds between two looks at a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cgroup", type=Path, help="a memory cgroup that may be limited")
    parser.add_argument("--room", type=int, default=1_500_000_000, help="bytes above imports")
    parser.add_argument("--rows", nargs="*", default=["deep", "wide"], choices=SHAPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    after_imports = memory_after_imports()
    limit = after_imports + options.room
    results: dict[str, Any] = {"memory_after_imports": after_imports, "limit": None}
    if options.cgroup:
        results["limit"] = limit
        set_limit(options.cgroup, limit)
    with tempfile.TemporaryDirectory() as name:
        results["small"] = compare(Path(name), options.seed)
        for row in options.rows:
            found = measure(Path(name), row, options.seed, options.cgroup)
            found["peak_above_imports"] = found["peak"] - after_imports
            results[row] = found
            print(row, json.dumps(found), flush=True)
    settings = {
        "shapes": {row: SHAPES[row] for row in ("small", *options.rows)},
        "arguments": [*RECIPE, *TEXT, *STREAM],
        "characters": CHARACTERS,
        "dtype": "bfloat16",
        "room": options.room,
        "seconds_between_looks": EVERY,
    }
    _record.write(options.out, options.seed, settings, results, quiet=True)


def memory_after_imports() -> int:
    """Resident bytes of a process that has imported all that a run imports."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    return memory_of(done.stdout)["VmRSS"]


def memory_of(status: str) -> dict[str, int]:
    """Bytes by the names that Linux gives them."""
    lines = (line.split() for line in status.splitlines())
    return {x[0][:-1]: int(x[1]) * 1024 for x in lines if len(x) == 3 and x[2] == "kB"}


def set_limit(cgroup: Path, limit: int) -> None:
    """Limit what a group may hold in memory, page cache included."""
    is_old = (cgroup / "memory.limit_in_bytes").exists()
    (cgroup / ("memory.limit_in_bytes" if is_old else "memory.max")).write_text(str(limit))


def compare(folder: Path, seed: int) -> dict[str, Any]:
    """Compress a small model with and without streaming; hold the weights against each other."""
    make(folder, "small", seed)
    found = {}
    for way, flags in (("whole", []), ("streamed", STREAM)):
        out = folder / way
        subprocess.run(command(folder / "small", out, flags), check=True, stdout=subprocess.DEVNULL)
        found[way] = dict(digests(out))
        shutil.rmtree(out)
    shutil.rmtree(folder / "small")
    whole = hashlib.sha256(json.dumps(sorted(found["whole"].items())).encode()).hexdigest()
    is_same = found["whole"] == found["streamed"]
    return {"tensors": len(found["whole"]), "same_bytes": is_same, "sha256": whole}


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            numbers = tensor.flatten().view(torch.uint8).numpy()
            yield name, hashlib.sha256(numbers.tobytes()).hexdigest()


def measure(folder: Path, row: str, seed: int, cgroup: Path | None) -> dict[str, Any]:
    """Write a model, compress it in a process of its own, and watch its memory."""
    making = multiprocessing.get_context("spawn").Process(target=make, args=(folder, row, seed))
    making.start()  # its memory would count as that of whatever this process starts later
    making.join()
    model, out = folder / row, folder / f"{row}-compressed"
    size = sum(forgotten(file) for file in model.glob("*.safetensors"))
    start = time.perf_counter()
    found = watched(command(model, out, STREAM), out, cgroup, folder / "log")
    found["seconds"] = time.perf_counter() - start
    found["model_bytes"] = size
    if found["exit_code"] == 0:
        report = json.loads((out / "report.json").read_text())
        found["compressed_bytes"] = sum(x.stat().st_size for x in out.glob("*.safetensors"))
        found["shards"] = len(list(out.glob("*.safetensors")))
        found["seconds_by_phase"] = report["seconds"]
        found["worst_token_check"] = max(x["token_check"] or 0 for x in report["linears"])
        shutil.rmtree(out)
    else:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
    shutil.rmtree(model)
    return found


def command(model: Path, out: Path, flags: list[str]) -> list[str]:
    """Compress by the command line."""
    run = [sys.executable, "-m", "slimrank", "compress", str(model), str(out)]
    return [*run, *RECIPE, "--calibration", str(model / "text.txt"), *TEXT, *flags, "--json"]


def forgotten(file: Path) -> int:
    """Drop a file from the page cache; give its size."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return file.stat().st_size


def watched(arguments: list[str], out: Path, cgroup: Path | None, log: Path) -> dict[str, Any]:
    """Run a command to its end; largest memory, in all and by what was going on."""
    enter = ["sh", "-c", ENTER, str(cgroup)] if cgroup else []
    peaks: Counter[str] = Counter()
    with log.open("w") as said:
        process = subprocess.Popen([*enter, *arguments], stdout=said, stderr=said)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            look(process.pid, out, peaks)
            time.sleep(EVERY)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {"exit_code": process.returncode, "peak": usage.ru_maxrss * 1024, **peaks}


def look(process: int, out: Path, peaks: Counter[str]) -> None:
    """Take in what a process holds now."""
    try:
        now = memory_of(Path(f"/proc/{process}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return
    if "VmRSS" not in now:
        return
    stage = "until_first_block_is_done"
    if any(state_folder(out).glob("block-*.json")):
        is_writing = any(state_folder(out).glob(f".{out.name}.partial-*"))
        stage = "in_writing" if is_writing else "in_blocks"
    seen = {
        "peak_anonymous": now["RssAnon"],
        "peak_mapped": now["RssFile"],
        f"peak_{stage}": now["VmRSS"],
    }
    for name, value in seen.items():
        peaks[name] = max(peaks[name], value)


def make(folder: Path, row: str, seed: int) -> None:
    """Write a random model, its tokenizer and a text, one block in memory at a time."""
    hidden, intermediate, blocks, vocabulary = SHAPES[row]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {x: t.shape for x, t in LlamaForCausalLM(config).state_dict().items()}
    place = folder / row
    place.mkdir()
    draw = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for name in shapes:
        parts = name.split(".")
        files[name] = f"{'.'.join(parts[1:3]) if 'layers' in parts else name}.safetensors"
    for file in dict.fromkeys(files.values()):
        inside = [name for name in files if files[name] == file]
        save_file({x: drawn(shapes[x], draw) for x in inside}, place / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(place)
    tokenizer().save_pretrained(place)
    (place / "text.txt").write_text(packaged_text("calibration")[:CHARACTERS], encoding="utf-8")


def drawn(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Norms of ones, and what else there is as transformers begins with it."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters."""
    words = {x: number for number, x in enumerate(["<unk>", *string.printable])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


if __name__ == "__main__":
    main()
