"""The real job, small: SmolLM2-135M from PyPI, compressed, loaded in a fresh process, evaluated.

Held as claims, not as figures tuned to a file: what is measured is what was promised, the folder is
smaller by what the report says, and the methods that look at activations beat the one that does
not, by far.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from slimrank import CompressionRecipe, compress, profile
from slimrank.calibration import packaged_text
from slimrank.checkpoint import read_report
from slimrank.demo import continue_text, fetch_model
from slimrank.evaluation import perplexity
from slimrank.nn import cache_bytes
from slimrank.options import CompressionOptions
from slimrank.source import load_model, load_tokenizer, parse_source, tokenize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FRESH = """
import sys, torch
if sys.argv[4] == "import": import slimrank
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits}, sys.argv[3])
"""


def recipe(method: str) -> CompressionRecipe:
    chosen = {} if method == "default" else {"method": method}
    return CompressionRecipe.from_dict(
        {
            "budget": {"param_ratio": 0.8},
            **chosen,
            "calibration": {"num_sequences": 8, "sequence_length": 512},
        }
    )


def fresh_process(folder: Path, ids: torch.Tensor, imported: bool) -> torch.Tensor | None:
    inputs, outputs = folder.parent / "ids.safetensors", folder.parent / "logits.safetensors"
    save_file({"ids": ids}, inputs)
    how = "import" if imported else "no"
    command = [sys.executable, "-c", FRESH, *map(str, (folder, inputs, outputs)), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return load_file(outputs)["logits"] if done.returncode == 0 else None


@pytest.fixture(autouse=True)
def all_threads():
    """The tiny tests run on one thread; this one has work for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense():
    """The dense model, not to be changed: reading GGUF takes half a minute."""
    return load_model(parse_source(fetch_model()))


def test_the_main_job(tmp_path, dense):
    tokenizer = load_tokenizer(parse_source(fetch_model()))
    ids = tokenize(tokenizer, packaged_text("evaluation"))
    found = {"dense": perplexity(dense, ids, 512, 4).value}
    for method in ("swift-svd", "default", "svd"):
        model = copy.deepcopy(dense)
        report = compress(model, recipe(method), tokenizer=tokenizer, out=tmp_path / method)
        found[method] = perplexity(model, ids, 512, 4).value
        low = [linear for linear in report.linears if linear.rank is not None]
        assert len(low) == 210 or method == "default"
        for linear in low:
            assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-3)
        size = report.size
        file = tmp_path / method / "model.safetensors"
        assert file.stat().st_size == size.weight_bytes < size.weight_bytes_before
        assert size.target_params <= 0.8 * size.target_params_before
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        if method == "swift-svd":
            with torch.no_grad():
                logits = model(ids[:64][None]).logits
            again = fresh_process(tmp_path / method, ids[:64][None].clone(), imported=True)
            assert again is not None
            assert torch.equal(logits, again)
            assert fresh_process(tmp_path / method, ids[:64][None].clone(), imported=False) is None
            assert len(continue_text(model, tokenizer, "The alphabet is", tokens=8).split()) > 3
    assert found["dense"] < found["swift-svd"] < 0.1 * found["svd"]
    assert found["dense"] < found["default"] < 0.7 * found["swift-svd"]


def test_one_profile_serves_every_size_and_the_cache(tmp_path, dense):
    source = parse_source(fetch_model())
    tokenizer = load_tokenizer(source)
    calibration = {"num_sequences": 8, "sequence_length": 256, "held_out_sequences": 1}
    small = {
        "effort": "fast",
        "layout": "plain",
        "budget": {"param_ratio": 0.6},
        "calibration": calibration,
    }
    profile(
        source.name,
        CompressionRecipe.from_dict(small),
        tmp_path / "profile",
        for_kv_cache=True,
    )
    ids = tokenize(tokenizer, packaged_text("evaluation"))[None, :300]
    dynamic = {"allocation": "swift", "swift": {"importance_weight": 0.5}}
    for name, settings in (("uniform", {}), ("dynamic", dynamic)):
        report = compress(
            copy.deepcopy(dense),
            CompressionRecipe.from_dict(small | settings),
            tokenizer=tokenizer,
            profile=tmp_path / "profile",
            out=tmp_path / name,
        )
        assert report.seconds.keys() == {"load", "build"} | ({"allocate"} if settings else set())
        low = [linear for linear in report.linears if linear.rank is not None]
        for linear in low:
            assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6)
    sizes = [read_report(tmp_path / name).size.target_params for name in ("uniform", "dynamic")]
    assert sizes[0] == sizes[1]
    latent = copy.deepcopy(dense)
    cached = small | {"budget": {"param_ratio": 1.0}, "kv_cache": {"keep": 0.5}}
    compress(latent, CompressionRecipe.from_dict(cached), profile=tmp_path / "profile")
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        tokens = latent.generate(ids, **options)
        assert torch.equal(tokens, latent.generate(ids, use_cache=False, **options))
        cache = DynamicCache(config=latent.config)
        latent(ids, past_key_values=cache, use_cache=True)
    # thirty blocks of 96 + 96 numbers for each token, and one pair of position embeddings of 64
    assert cache_bytes(cache) == 300 * 4 * (30 * 192 + 2 * 64)


def test_block_after_block_cut_off_and_resumed(tmp_path, dense):
    """Three blocks anchored and refined: every promise is kept, and a cut leaves the same bytes."""
    tokenizer = load_tokenizer(parse_source(fetch_model()))
    recipe = CompressionRecipe.from_dict(
        {
            "budget": {"param_ratio": 0.6},
            "method": "aa-svd",
            "targets": [r"re:.*layers\.[012]\."],
            "refine": {"preset": "fast", "epochs": 2, "batch_sequences": 2},
            "calibration": {
                "num_sequences": 8,
                "sequence_length": 256,
                "held_out_sequences": 2,
            },
        }
    )

    def cut(steps, _what):
        for step in steps:
            if step == 2:
                raise KeyboardInterrupt
            yield step

    files = []
    for name, tracks in (("whole", [None]), ("cut", [cut, None])):
        for track in tracks:
            options = CompressionOptions(track=track) if track else CompressionOptions()
            arguments = {"tokenizer": tokenizer, "out": tmp_path / name, "options": options}
            model = copy.deepcopy(dense)
            if track:
                with pytest.raises(KeyboardInterrupt):
                    compress(model, recipe, **arguments)
            else:
                report = compress(model, recipe, **arguments, resume=len(tracks) > 1)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    low = [linear for linear in report.linears if linear.rank is not None]
    assert len(low) == 21
    for linear in low:
        assert linear.measured_loss == pytest.approx(linear.predicted_loss, rel=1e-6)
    assert len(report.blocks) == 30
    for block in report.blocks[:3]:
        assert block.held_out.relative_error <= block.unrefined_held_out.relative_error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
