"""A compressed model is an ordinary model to transformers, PEFT and accelerate."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimrank
from slimrank import LowRankLinear

# transformers 5.23 deprecates names that PEFT 0.21 still uses, and that older versions only have.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning"
)
FAMILIES = ["llama", "qwen2_tied", "opt", "falcon"]


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(params=["memory", "from_pretrained"])
def how(request):
    return request.param


@pytest.fixture
def make(make_compressed, tmp_path, how):
    """A compressed model, as it is in memory or as it comes from disk."""

    def compressed(family):
        model, _ = make_compressed(family, keep=0.6)
        if how == "memory":
            return model
        model.save_pretrained(tmp_path / "made")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "made")

    return compressed


CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "float": (lambda m: m.float(), torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "there and back": (lambda m: m.half().float(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_casts(family, make, cast, probe, tmp_path):
    model = make(family)
    expected = logits_of(model, probe)
    change, dtype = CASTS[cast]
    model = change(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(logits_of(model, probe).float(), expected, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path / "cast")
    again = slimrank.load(tmp_path / "cast")
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again(family, make, probe, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    files = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]
    assert torch.equal(logits_of(slimrank.load(tmp_path / "b"), probe), logits_of(model, probe))


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_a_dense_model(family, make, probe, tmp_path):
    model = make(family)
    expected = logits_of(model, probe)
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    dense = model.dequantize()
    assert not any(isinstance(m, LowRankLinear) for m in dense.modules())
    torch.testing.assert_close(logits_of(dense, probe), expected, rtol=1e-4, atol=1e-4)
    for name, rank in ranks.items():
        values = torch.linalg.svdvals(dense.get_submodule(name).weight.detach())
        assert int((values > 1e-5 * values[0]).sum()) == rank
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits_of(again, probe), logits_of(dense, probe))
    assert getattr(again, "hf_quantizer", None) is None


def test_a_dequantized_model_can_be_compressed_again(make, make_recipe, windows):
    dense = make("llama").dequantize()
    slimrank.compress(dense, make_recipe(keep=0.4), windows=windows)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_deep_copy(family, make, probe):
    model = make(family)
    assert torch.equal(logits_of(copy.deepcopy(model), probe), logits_of(model, probe))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, make, tiny):
    ids = torch.tensor([[tiny.BOS, 10, 11], [tiny.BOS, 20, 21]])
    model = make(family)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert made.shape == (2, 8)


def test_gradients_reach_both_factors(make, probe):
    model = make("qwen2").train()
    model(input_ids=probe, labels=probe).loss.backward()
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            for parameter in (module.latent.weight, module.expand.weight):
                assert parameter.grad is not None
                assert parameter.grad.abs().sum() > 0
            assert not module.weight.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_checkpointing(family, make, probe):
    model = make(family).train()
    model.gradient_checkpointing_enable()
    model(input_ids=probe, labels=probe).loss.backward()


def test_one_step_of_trainer(make, probe, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in probe]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if ".latent." in n or ".expand." in n} <= changed
    trainer.save_model(str(tmp_path / "tuned"))
    again = slimrank.load(tmp_path / "tuned")
    model.eval()
    assert torch.equal(logits_of(again, probe), logits_of(model, probe))


def test_lora_on_the_factors(make, probe, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make("llama")
    expected = logits_of(base, probe)
    config = LoraConfig(r=2, target_modules=["latent", "expand"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.eval()
    assert not torch.equal(logits_of(model, probe), expected)
    model.train()
    model(input_ids=probe, labels=probe).loss.backward()
    touched = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(touched) == 14 * 2 * 2
    assert all("lora_" in name for name in touched)
    model.eval()
    tuned = logits_of(model, probe)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, probe), tuned, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = slimrank.load(tmp_path / "merged")
    assert torch.equal(logits_of(again, probe), logits_of(merged, probe))
    fresh = PeftModel.from_pretrained(make("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(fresh, probe), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(compressed_folder, probe, device_map):
    expected = logits_of(slimrank.load(compressed_folder), probe)
    for model in (
        slimrank.load(compressed_folder, device_map=device_map),
        AutoModelForCausalLM.from_pretrained(compressed_folder, device_map=device_map),
    ):
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(logits_of(model, probe), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(compressed_folder, probe, attention):
    model = slimrank.load(compressed_folder, attn_implementation=attention)
    expected = logits_of(slimrank.load(compressed_folder), probe)
    torch.testing.assert_close(logits_of(model, probe), expected, rtol=1e-4, atol=1e-4)


def test_resizing_the_vocabulary(make, tmp_path, probe):
    model = make("qwen2_tied")
    model.resize_token_embeddings(112, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    again = slimrank.load(tmp_path / "resized")
    assert again.get_input_embeddings().weight.shape[0] == 112
    assert torch.equal(logits_of(again, probe), logits_of(model, probe))


def test_export_of_the_graph(make, probe):
    model = make("llama")
    linear = model.model.layers[0].mlp.up_proj
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(linear, (states,))
    assert torch.equal(program.module()(states), linear(states))
