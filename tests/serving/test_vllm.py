"""vLLM says what transformers says, token for token: `make test-vllm`, in a venv of its own.

Engines are started in processes of their own, as users start them, and nothing of slimrank is
imported there.
"""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimrank import CompressionOptions, CompressionRecipe, compress, load, quantize
from slimrank.calibration import TokenWindows
from slimrank.demo import fetch_model
from slimrank.source import load_model, load_tokenizer, parse_source
from tiny import models

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW = 24
PROMPTS = [[5, 9, 17, 30, 44], [60, 61, 62]]
SIDES = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
ENGINE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams
    folder, prompts, settings, new = json.loads(sys.argv[1])
    engine = LLM(folder, **settings)
    how = SamplingParams(max_tokens=new, min_tokens=new, temperature=0, ignore_eos=True)
    given = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in given]))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """`compressed(family, layout)` is a folder of different ranks, some linears dense."""
    made = {}

    def make(family, layout="auto"):
        if (family, layout) not in made:
            folder = tmp_path_factory.mktemp(family)
            sides = {**SIDES, "head_dim": 32} if family == "qwen3" else SIDES
            models.build(family, **sides).save_pretrained(folder / "dense")
            models.build_tokenizer().save_pretrained(folder / "dense")
            generator = torch.Generator().manual_seed(0)
            windows = TokenWindows(tuple(torch.randint(4, 96, (8, 64), generator=generator)))
            recipe = CompressionRecipe.from_dict(
                {
                    "method": "kfac-svd",
                    "allocation": "global",
                    "layout": layout,
                    "budget": {"param_ratio": 0.7},
                }
            )
            options = CompressionOptions(remote_code=True)  # which vLLM passes by
            report = compress(
                folder / "dense", recipe, out=folder / "out", windows=windows, options=options
            )
            ranks = {linear.rank for linear in report.linears}
            assert len(ranks) > 3
            assert None in ranks
            made[family, layout] = folder / "out"
        return made[family, layout]

    return make


def by_transformers(folder, prompts, new=NEW):
    model = load(folder, dtype="float32")
    found = []
    for prompt in prompts:
        given = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(given[0, len(prompt) :].tolist())
    return found


def run_engine(tmp_path, folder, prompts, new=NEW, parts=1, **settings):
    (tmp_path / "engine.py").write_text(ENGINE)
    values = {
        "dtype": "float32",
        "max_model_len": 128,
        "tensor_parallel_size": parts,
        "enforce_eager": True,
        **settings,
    }
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if parts == 2 else {}
    arguments = json.dumps([str(folder), prompts, values, new])
    return subprocess.run(
        [sys.executable, tmp_path / "engine.py", arguments],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | threads,
        cwd=tmp_path,
        timeout=600,
        check=False,
    )


def tokens(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS"))
    return json.loads(line.removeprefix("TOKENS"))


def test_it_is_the_version_that_the_page_names():
    assert version("vllm-cpu") == "0.32.0"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", "plain"), ("llama", "pivoted"), ("qwen2_tied", "auto"), ("qwen3", "pivoted")],
)
def test_tokens_agree(family, layout, parts, compressed, tmp_path):
    folder = compressed(family, layout)
    done = run_engine(tmp_path, folder, PROMPTS, parts=parts)
    assert tokens(done) == by_transformers(folder, PROMPTS)


def test_tokens_agree_where_it_compiles(compressed, tmp_path):
    folder = compressed("llama", "auto")
    done = run_engine(tmp_path, folder, PROMPTS, enforce_eager=False)
    assert tokens(done) == by_transformers(folder, PROMPTS)


@pytest.mark.parametrize(
    ("family", "layout", "parts"), [("qwen2_tied", "plain", 1), ("qwen3", "pivoted", 2)]
)
def test_tokens_agree_of_codes(family, layout, parts, compressed, tmp_path):
    quantize(compressed(family, layout), tmp_path / "codes")
    done = run_engine(tmp_path, tmp_path / "codes", PROMPTS, parts=parts)
    assert tokens(done) == by_transformers(tmp_path / "codes", PROMPTS)


def test_codes_run_in_bfloat16_where_it_compiles(compressed, tmp_path):
    quantize(compressed("llama", "pivoted"), tmp_path / "codes")
    settings = {"dtype": "bfloat16", "enforce_eager": False}
    found = tokens(run_engine(tmp_path, tmp_path / "codes", PROMPTS, **settings))
    assert [len(one) for one in found] == [NEW, NEW]


def test_it_runs_in_bfloat16(compressed, tmp_path):
    found = tokens(run_engine(tmp_path, compressed("qwen3", "pivoted"), PROMPTS, dtype="bfloat16"))
    assert [len(one) for one in found] == [NEW, NEW]


@pytest.mark.parametrize("kind", ["latent.weight", "pivots", "weight"])
def test_a_missing_tensor_is_an_error_with_its_name(kind, compressed, tmp_path):
    source, folder = compressed("llama", "pivoted"), tmp_path / "damaged"
    state = load_file(source / "model.safetensors")
    lost = next(
        name
        for name, tensor in state.items()
        if name.endswith(f"q_proj.{kind}") and (kind != "weight" or not tensor.numel())
    )
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kept = {name: tensor for name, tensor in state.items() if name != lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    done = run_engine(tmp_path, folder, PROMPTS)
    assert done.returncode != 0
    assert f"lacks 1 tensors of a linear, such as {lost}" in done.stdout + done.stderr


def test_without_the_plugin_it_is_refused(compressed, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    done = run_engine(tmp_path, compressed("llama", "plain"), PROMPTS)
    assert done.returncode != 0
    assert "low_rank" in done.stdout + done.stderr


def test_a_real_model_says_the_same(tmp_path):
    source = parse_source(fetch_model())
    tokenizer = load_tokenizer(source)
    recipe = {
        "effort": "fast",
        "layout": "auto",
        "budget": {"param_ratio": 0.8},
        "calibration": {"num_sequences": 8, "sequence_length": 256},
    }
    compress(
        load_model(source),
        CompressionRecipe.from_dict(recipe),
        out=tmp_path / "smollm2",
        tokenizer=tokenizer,
    )
    texts = ["The alphabet is a set of letters that", "In the beginning there was"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = tokens(run_engine(tmp_path, tmp_path / "smollm2", prompts, new=48))
    assert found == by_transformers(tmp_path / "smollm2", prompts, 48)


def test_its_server_answers_a_client(compressed, tmp_path):
    from openai import OpenAI

    folder = compressed("qwen2_tied", "auto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the command itself asks for a package named vllm, not vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    settings = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *settings, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | ENVIRONMENT,
            cwd=tmp_path,
        )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_for(client, server, tmp_path / "log")
        (name,) = (model.id for model in client.models.list())
        answer = client.completions.create(
            model=name,
            prompt=PROMPTS[0],
            max_tokens=NEW,
            temperature=0,
            extra_body={"min_tokens": NEW, "ignore_eos": True, "return_token_ids": True},
        )
        assert answer.choices[0].token_ids == by_transformers(folder, PROMPTS[:1])[0]
        assert answer.usage.completion_tokens == NEW
    finally:
        server.terminate()
        server.wait(60)


def wait_for(client, server, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.models.list()
            return
        except Exception:  # noqa: BLE001  # not there yet
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
