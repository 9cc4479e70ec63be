"""Each exported graph, run by its own runtime, goes on as transformers does."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import openvino
import openvino.opset14
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from slimrank import compress, load, quantize
from slimrank.errors import (
    CheckpointError,
    ModelError,
    NumericalError,
    RecipeError,
    SlimrankError,
)
from slimrank.exporting import GRAPHS, export, export_graph
from slimrank.exporting.onnx_form import OnnxForm
from tiny.faults import full_disk
from tiny.folders import edit_weights
from tiny.models import FAMILIES, VOCABULARY, WINDOW
from tiny.runtimes import TOKENS, torch_tokens

ONE = {"num_hidden_layers": 1}
NEW = 20
assert NEW > WINDOW
WEIGHTS = ("model.onnx_data", "openvino_model.bin")

pytestmark = pytest.mark.filterwarnings("ignore::slimrank.errors.CoverageWarning")


@pytest.fixture(scope="module")
def make_small(make_folder, make_recipe, make_windows, tmp_path_factory):
    """`make_small(family, layout, dtype, kv, **sizes)` gives a compressed folder, made once."""
    made: dict[str, Path] = {}

    def make(family, layout="plain", dtype=torch.float32, kv=False, **sizes):
        key = repr((family, layout, dtype, kv, sizes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("small") / family
            latents = {"kv_cache": {"keep": 0.5}} if kv else {}
            recipe = make_recipe(0.6, method="swift-svd", layout=layout, **latents)
            source = make_folder(family, dtype=dtype, **sizes)
            compress(source, recipe, out=made[key], windows=make_windows())
        return made[key]

    return make


@pytest.fixture(params=sorted(GRAPHS))
def form(request):
    """Each kind of graph."""
    return request.param


def assert_goes_on_alike(form, folder, out):
    """Two prompts as a batch, one padded on the left; then one alone."""
    ids = torch.arange(4, 20).reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = load(folder, dtype=torch.float32)
    for rows in (slice(0, 2), slice(1, 2)):
        expected = torch_tokens(model, ids[rows], mask[rows], NEW)
        assert torch.equal(TOKENS[form](out, ids[rows], mask[rows], NEW), expected)


def stored(folder):
    """Tensors of a folder that graphs hold too: pivots they have in another way."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file).items()
    return {name: t for name, t in tensors if t.numel() and not name.endswith(".pivots")}


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def constants(form, out):
    """Type and shape of each constant in a graph."""
    if form == "onnx":
        values = onnx_ir.load(out / "model.onnx").graph.initializers.values()
        return [(str(value.dtype).lower(), tuple(value.shape)) for value in values]
    nodes = openvino.Core().read_model(out / "openvino_model.xml").get_ops()
    found = [node for node in nodes if node.get_type_name() == "Constant"]
    return [(node.get_element_type().to_string(), tuple(node.shape)) for node in found]


@pytest.mark.parametrize(
    ("family", "layout", "sizes"),
    [
        ("llama", "pivoted", ONE),
        ("gemma3", "plain", ONE | {"layer_types": ["sliding_attention"]}),
    ],
)
def test_it_goes_on_as_transformers_does(form, family, layout, sizes, make_small, tmp_path):
    folder, out = make_small(family, layout, **sizes), tmp_path / "out"
    report = export(folder, out, form)
    assert_goes_on_alike(form, folder, out)
    assert (report.form, report.linears) == (form, 7)
    assert 0 < report.logits_apart < 1e-5
    assert_factors_alone(form, folder, out, report)
    assert_tidy(folder, out)


# Runtime, layout and what is new. Quick tests have Llama and Qwen2 with ties in both runtimes.
EACH = {
    "mistral": ("onnx", "pivoted"),  # a window in every layer
    "qwen2": ("openvino", "plain"),  # biases beside factors
    "qwen3": ("onnx", "plain"),  # norms of queries and keys
    "gemma2": ("openvino", "pivoted"),  # windows in turns, soft caps, a tie
    "gemma3": ("onnx", "pivoted"),  # windows in turns, each kind with rotations of its own
    "phi3": ("openvino", "plain"),  # fused projections
    "opt": ("onnx", "pivoted"),  # learned positions, biases beside pivots, a tie
    "gpt_neox": ("openvino", "pivoted"),  # parts of heads are rotated, fused in turns by head
    "olmo2": ("onnx", "plain"),  # norms of all heads together, and after the linears
    "falcon": ("openvino", "plain"),  # one head of keys for all, attention beside the MLP
    "mixtral": ("onnx", "pivoted"),  # experts
    "qwen3_moe": ("openvino", "pivoted"),  # more experts, whose weights do not add up to one
}


def test_no_family_is_forgotten():
    assert set(EACH) == set(FAMILIES) - {"llama", "qwen2_tied"}
    assert len(Counter(EACH.values())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_every_family_goes_on_as_transformers_does(family, make_small, tmp_path):
    form, layout = EACH[family]
    mixed = family in ("gemma2", "gemma3")  # their layers have windows in turns
    folder = make_small(family, layout, **({} if mixed else ONE))
    export(folder, tmp_path / "out", form)
    assert_goes_on_alike(form, folder, tmp_path / "out")


def assert_factors_alone(form, folder, out, report):
    """No product is in the graph, and what is tied is there once."""
    tensors = stored(folder)
    (weights,) = (path for path in out.iterdir() if path.name in WEIGHTS)
    assert report.weight_bytes == weights.stat().st_size
    assert report.weight_bytes < 1.1 * nbytes(tensors)
    model = load(folder, dtype="auto")
    shapes = [shape for _, shape in constants(form, out)]
    assert {(linear.rank, linear.in_features) for linear in factorised(model)} <= set(shapes)
    dense = {(linear.out_features, linear.in_features) for linear in factorised(model)}
    dense -= {tuple(tensor.shape) for tensor in tensors.values()}
    assert dense
    assert not (dense | {shape[::-1] for shape in dense}) & set(shapes)
    table = tuple(model.get_input_embeddings().weight.shape)
    assert shapes.count(table) == (1 if model.config.tie_word_embeddings else 2)


def factorised(model):
    return [module for module in model.modules() if type(module).__name__ == "LowRankLinear"]


def assert_tidy(folder, out):
    """It needs no slimrank, has the tokenizer, and tells nothing of the machine it was made on."""
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, out)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    names = {path.name for path in out.iterdir()}
    assert not names & {"README.md", "recipe.yaml", "report.json", "model.safetensors"}
    told = b"".join(path.read_bytes() for path in out.iterdir())
    assert b"site-packages" not in told
    assert b"modeling_" not in told


def test_weights_of_16_bits_stay_so(form, make_small, tmp_path):
    folder = make_small("qwen2_tied", "auto", torch.bfloat16, **ONE)
    report = export(folder, tmp_path / "out", form)
    assert_goes_on_alike(form, folder, tmp_path / "out")
    assert report.weight_bytes < 1.2 * nbytes(stored(folder))
    wide = {"float", "f32"}
    kinds = {kind for kind, shape in constants(form, tmp_path / "out") if len(shape) == 2}
    assert not wide & kinds


def test_codes_stay_codes(form, make_small, tmp_path):
    quantize(make_small("llama", "pivoted", **ONE), tmp_path / "int8", dense_linears=True)
    report = export(tmp_path / "int8", tmp_path / "out", form)
    assert_goes_on_alike(form, tmp_path / "int8", tmp_path / "out")
    codes = {name: t for name, t in stored(tmp_path / "int8").items() if t.dtype == torch.int8}
    kinds = [shape for kind, shape in constants(form, tmp_path / "out") if kind in ("int8", "i8")]
    assert sorted(kinds) == sorted(tuple(tensor.shape) for tensor in codes.values())
    assert report.weight_bytes < 1.2 * nbytes(stored(tmp_path / "int8"))


def test_a_cache_of_latents_becomes_an_ordinary_one(make_small, tmp_path):
    folder = make_small("phi3", kv=True, **ONE)
    export(folder, tmp_path / "out", "onnx")
    assert_goes_on_alike("onnx", folder, tmp_path / "out")


class Ready(OnnxForm):
    """Spares the time to trace: the graph that was written once."""

    def __init__(self, written):
        self.written = written

    def trace(self, model):
        return onnx_ir.load(self.written / "model.onnx")


@pytest.fixture(scope="module")
def ready(make_small, tmp_path_factory):
    """A folder, and a form whose graph of it is made."""
    folder, out = make_small("llama", "pivoted", **ONE), tmp_path_factory.mktemp("ready") / "out"
    export(folder, out, "onnx")
    return folder, Ready(out)


def test_names_are_those_that_users_know(ready):
    session = onnxruntime.InferenceSession(ready[1].written / "model.onnx")
    inputs = {each.name: each.shape for each in session.get_inputs()}
    past = ["batch_size", 2, "past_sequence_length", 8]
    every = "past_sequence_length + sequence_length"
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", every],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    present = ["batch_size", 2, every, 8]
    assert {each.name: each.shape for each in session.get_outputs()} == {
        "logits": ["batch_size", "sequence_length", VOCABULARY],
        "present.0.key": present,
        "present.0.value": present,
    }


def test_each_weight_is_there_under_its_name_to_the_bit(ready):
    folder, form = ready
    values = onnx_ir.load(form.written / "model.onnx").graph.initializers
    for name, tensor in stored(folder).items():
        assert np.array_equal(values[name].const_value.numpy(), tensor.numpy()), name


@pytest.mark.parametrize("moment", [2, 5, 8])
def test_a_full_disk_leaves_nothing(moment, ready, tmp_path):
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    with full_disk(tmp_path, None) as done:
        export_graph(*ready_to(ready, tmp_path / "whole"))
    assert moment < len(done) - 2
    with full_disk(tmp_path, moment), pytest.raises(CheckpointError, match="No space left"):
        export_graph(*ready_to(ready, out))
    assert not list(out.parent.iterdir())


def ready_to(ready, out):
    return ready[0], out, ready[1]


def test_a_full_disk_under_openvino_is_told(monkeypatch, tmp_path):
    """It writes from C++, and says no more than that its stream failed."""

    def full(*_args, **_kwargs):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(CheckpointError, match="iostream error; is the disk full"):
        GRAPHS["openvino"].write(None, tmp_path)


@pytest.mark.parametrize("form", sorted(GRAPHS))
def test_what_does_not_read_back_is_refused(form, tmp_path, monkeypatch):
    if form == "onnx":
        graph = tiny_onnx()
        real, where = onnx_ir.save, "onnx_ir.save"
    else:
        ops = openvino.opset14
        inputs = ops.parameter([2], np.float32)
        graph = openvino.Model([ops.add(inputs, np.arange(2, dtype=np.float32))], [inputs])
        real, where = openvino.save_model, "openvino.save_model"

    def torn(*arguments, **named):
        real(*arguments, **named)
        (weights,) = (path for path in tmp_path.iterdir() if path.name in WEIGHTS)
        weights.write_bytes(bytes(weights.stat().st_size))

    monkeypatch.setattr(where, torn)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        GRAPHS[form].write(graph, tmp_path)


def tiny_onnx():
    weight = onnx_ir.tensor(np.ones((16, 16), np.float32), name="weight")
    value = onnx_ir.Value(name="weight", const_value=weight)
    node = onnx_ir.node("Identity", [value])
    graph = onnx_ir.Graph(
        [], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}
    )
    return onnx_ir.Model(graph, ir_version=10)


def test_other_logits_are_refused(ready, tmp_path, monkeypatch):
    """Such as those of a graph that forgets what was in the cache."""
    real = OnnxForm.run

    def forgetful(self, folder):
        def step(inputs):
            alone = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
            return real(self, folder)(alone)

        return step

    monkeypatch.setattr(OnnxForm, "run", forgetful)
    with pytest.raises(ModelError, match="LlamaForCausalLM as ONNX runs, but its logits are"):
        export_graph(*ready_to(ready, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(
    form, dense_folder, make_small, make_folder, make_recipe, make_windows, tmp_path
):
    def refused(folder, error, said, out=tmp_path / "out"):
        with pytest.raises(error, match=said):
            export(folder, out, form)
        assert not (tmp_path / "out").exists()

    small = make_small("llama", "pivoted", **ONE)
    refused(dense_folder, CheckpointError, "not compressed by slimrank")
    refused(small, CheckpointError, "exists already", out=tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(small, damaged)
    edit_weights(damaged, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    refused(damaged, NumericalError, "NaN or infinite weights")
    quantize(make_small("llama", "plain", torch.bfloat16), tmp_path / "q", packing="remapped")
    refused(
        tmp_path / "q", ModelError, r"q_proj are packed \('remapped'\), which no graph can hold"
    )
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    by_length = make_small("llama", rope_parameters=rope, **ONE)
    refused(by_length, ModelError, "cannot export LlamaForCausalLM as .*: Could not guard")


def test_a_missing_package_is_named(form, make_small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime" if form == "onnx" else "openvino", None)
    said = rf"needs .*: pip install 'slimrank\[{form}\]'"
    with pytest.raises(SlimrankError, match=said):
        export(make_small("llama", "pivoted", **ONE), tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_refused(compressed_folder, tmp_path):
    with pytest.raises(RecipeError, match="--to is 'gguf'; it is one of dense, onnx, openvino"):
        export(compressed_folder, tmp_path / "out", "gguf")
