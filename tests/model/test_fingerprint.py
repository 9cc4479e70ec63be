"""Two models have one fingerprint only if they have the same weights, bit by bit."""

import pytest
import torch

from slimrank.model import weights_fingerprint


def test_the_same_weights(make_model):
    one, other = make_model("llama"), make_model("llama")
    assert weights_fingerprint(one) == weights_fingerprint(other)
    one.requires_grad_(False)
    assert weights_fingerprint(one) == weights_fingerprint(other)


def test_a_folder_and_a_model_in_memory(make_model, tmp_path):
    model = make_model("qwen2_tied")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert weights_fingerprint(again) == weights_fingerprint(model)


def test_the_last_bit_of_any_weight_counts(make_model):
    model = make_model("llama")
    prints = {weights_fingerprint(model)}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        prints.add(weights_fingerprint(model))
    assert len(prints) == 1 + len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_counts(make_model, dtype):
    model = make_model("llama", dtype=dtype)
    before = weights_fingerprint(model)
    assert len(before) == 64
    assert weights_fingerprint(model.float()) != before  # the same numbers
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    model = make_model("llama", dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.view(other)  # the same bytes
    assert weights_fingerprint(model) != before


def test_names_and_shapes_count():
    weight = torch.arange(6.0)

    def of(name, *shape):
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(weight.reshape(shape)))
        return weights_fingerprint(module)

    assert len({of("a", 2, 3), of("a", 3, 2), of("a", 6), of("b", 2, 3)}) == 4


def test_a_tied_weight_counts_once(make_model):
    tied, untied = make_model("qwen2_tied"), make_model("qwen2_tied")
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert weights_fingerprint(untied) != weights_fingerprint(tied)


def test_a_transposed_view_is_its_values():
    module, straight = torch.nn.Module(), torch.nn.Module()
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    module.weight = torch.nn.Parameter(values.mT.contiguous().mT)
    straight.weight = torch.nn.Parameter(values)
    assert weights_fingerprint(module) == weights_fingerprint(straight)
