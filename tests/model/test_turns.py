"""Blocks that come to a device in turns; "meta" is one that holds no numbers, and will do here.

With numbers: tests/test_devices.py.
"""

import torch

from slimrank.checkpoint import load_mapped
from slimrank.model import copy_of, device_of, is_mapped, let_go, staying


def on_meta(folder):
    model = load_mapped(folder, device="meta")
    return model, list(model.model.layers)


def devices(module):
    return {tensor.device.type for tensor in module.parameters()}


def test_blocks_stay_in_their_files_and_all_else_comes_for_good(dense_folder):
    model, blocks = on_meta(dense_folder)
    assert is_mapped(model)
    for block in blocks:
        assert devices(block) == {"cpu"}
        assert device_of(block) == torch.device("meta")
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        assert devices(part) == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert device_of(load_mapped(dense_folder).model.layers[0]) == torch.device("cpu")


def test_a_block_leaves_as_it_came(dense_folder):
    _, (block, _) = on_meta(dense_folder)
    before = list(block.parameters())
    with staying(block):
        assert devices(block) == {"meta"}
        assert is_mapped(block)
    let_go(block)
    assert all(now is then for now, then in zip(block.parameters(), before, strict=True))


def test_what_is_shared_in_a_block_stays_shared(dense_folder):
    _, (block, _) = on_meta(dense_folder)
    block.mlp.gate_proj.weight = block.mlp.up_proj.weight
    for own in (False, True):
        if own:
            mlp = block.mlp
            mlp.gate_proj.weight = mlp.up_proj.weight = torch.nn.Parameter(torch.ones(48, 32))
        with staying(block):
            assert block.mlp.gate_proj.weight is block.mlp.up_proj.weight
            assert devices(block) == {"meta"}


def test_who_stays_within_staying_stays_to_the_end(dense_folder):
    model, (block, other) = on_meta(dense_folder)
    with staying(block):
        with staying(block):
            pass
        for part in (block, other):
            for hook in part._forward_pre_hooks.values():
                hook(part, ())
        assert devices(block) == {"meta"}
    assert devices(other) == {"meta"}
    model.lm_head._forward_pre_hooks.popitem()[1](model.lm_head, ())
    assert devices(other) == {"cpu"}


def test_a_copy_shares_what_comes_from_files_also_on_the_device(dense_folder):
    model, (block, _) = on_meta(dense_folder)
    with staying(block):
        copied = copy_of(model)
    for name, parameter in model.named_parameters():
        assert copied.get_parameter(name) is parameter, name


def test_what_comes_in_inference_mode_can_be_trained_later(dense_folder):
    _, (block, _) = on_meta(dense_folder)
    with torch.inference_mode(), staying(block):
        assert not any(parameter.is_inference() for parameter in block.parameters())


def test_a_block_that_is_stood_in_for_does_not_come(dense_folder):
    _, (block, _) = on_meta(dense_folder)
    block.forward = lambda states: states
    block(torch.zeros(1))
    assert devices(block) == {"cpu"}
    del block.forward
