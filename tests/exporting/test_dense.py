"""An exported folder is an ordinary checkpoint that computes what the factors do."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimrank import compress, load, quantize
from slimrank.errors import CheckpointError, NumericalError
from slimrank.exporting import export_dense
from tiny.folders import edit_weights, logits_of

LATENTS = {"kv_cache": {"keep": 0.5}}


@pytest.mark.filterwarnings("ignore::slimrank.errors.CoverageWarning")
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_it_is_the_same_function(
    family, layout, make_folder, make_recipe, make_windows, probe, tmp_path
):
    recipe = make_recipe(0.6, method="swift-svd", layout=layout)
    compress(make_folder(family), recipe, out=tmp_path / "small", windows=make_windows())
    assert_same(tmp_path / "small", tmp_path / "dense", probe)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2_tied"])
def test_without_a_cache_of_latents(name, make_folder, make_recipe, make_windows, probe, tmp_path):
    recipe = make_recipe(0.6, method="swift-svd", **LATENTS)
    compress(make_folder(name), recipe, out=tmp_path / "small", windows=make_windows())
    assert_same(tmp_path / "small", tmp_path / "dense", probe)


def assert_same(folder, out, probe):
    report = export_dense(folder, out)
    dense = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert not hasattr(dense.config, "quantization_config")
    factors = load(folder, dtype="auto")
    torch.testing.assert_close(logits_of(dense, probe), logits_of(factors, probe))
    assert report.logits_apart < 1e-5
    assert report.linears > 0
    assert report.weight_bytes > report.weight_bytes_before
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, out)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    left = {"README.md", "recipe.yaml", "report.json"}
    assert not left & {path.name for path in (out).iterdir()}


def test_its_shapes_are_those_of_the_model_before(make_folder, make_recipe, make_windows, tmp_path):
    source = make_folder("llama")
    compress(source, make_recipe(0.6), out=tmp_path / "small", windows=make_windows())
    export_dense(tmp_path / "small", tmp_path / "dense")
    shapes = [
        {name: t.shape for name, t in load(path, dtype="auto").state_dict().items()}
        for path in (source, tmp_path / "dense")
    ]
    assert shapes[0] == shapes[1]


def test_eight_bits_are_multiplied_out_too(compressed_folder, probe, tmp_path):
    quantize(compressed_folder, tmp_path / "int8", dense_linears=True)
    export_dense(tmp_path / "int8", tmp_path / "dense")
    dense, codes = (load(tmp_path / name, dtype="auto") for name in ("dense", "int8"))
    torch.testing.assert_close(logits_of(dense, probe), logits_of(codes, probe))
    assert not (tmp_path / "dense" / "quantize.json").exists()


def test_it_needs_no_slimrank(compressed_folder, tmp_path):
    export_dense(compressed_folder, tmp_path / "dense")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1]); assert 'slimrank' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "dense")]
    subprocess.run(command, check=True, capture_output=True)


def test_what_cannot_be_exported_is_refused(dense_folder, compressed_folder, tmp_path):
    with pytest.raises(CheckpointError, match="not compressed by slimrank"):
        export_dense(dense_folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        export_dense(compressed_folder, tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in compressed_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    edit_weights(damaged, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(NumericalError, match="NaN or infinite weights"):
        export_dense(damaged, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
