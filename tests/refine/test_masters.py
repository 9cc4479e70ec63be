"""Masters are finer than what is stored, and whatever happens, the block is put right."""

import pytest
import torch
from torch import nn

from slimrank.errors import NumericalError
from slimrank.nn import LowRankLinear
from slimrank.recipe import RefineRecipe
from slimrank.refine import refine_block
from slimrank.refine.masters import master_parameters


def state_of(block):
    return (
        {name: tensor.clone() for name, tensor in block.state_dict().items()},
        [parameter.requires_grad for parameter in block.parameters()],
        [module.training for module in block.modules()],
    )


def assert_is(block, state):
    tensors, flags, modes = state
    assert block.state_dict().keys() == tensors.keys()
    for name, tensor in block.state_dict().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name]), name
    assert [parameter.requires_grad for parameter in block.parameters()] == flags
    assert [module.training for module in block.modules()] == modes
    assert all(parameter.grad is None for parameter in block.parameters())


def mixed(block):
    """Give it flags and modes that are not all the same."""
    block.train()
    block.mlp.eval()
    block.self_attn.requires_grad_(False)
    return state_of(block)


def test_small_steps_add_up(make_pairs):
    """Each is a tenth of half the spacing of weights above 0.1, so stored ones do not move."""
    rate, epochs = 2e-5, 60

    def moved(train):
        block, pairs = make_pairs(dtype=torch.bfloat16)
        linear = block.self_attn.q_proj
        start = linear.latent.weight.detach().clone()
        train(block, pairs)
        assert linear.latent.weight.dtype == torch.bfloat16
        return (linear.latent.weight != start)[start.abs() > 0.1].float().mean()

    settings = RefineRecipe(
        preset="paper",
        epochs=epochs,
        learning_rate=rate,
        warmup=0,
        final_learning_rate=1,
        weight_decay=0,
    )

    def naive(block, pairs):
        factor = block.self_attn.q_proj.latent.weight
        optimizer = torch.optim.AdamW([factor], lr=rate, weight_decay=0)
        for _ in range(epochs):
            for batch in pairs.micro_batches(range(6)):
                outputs = block(batch.inputs, **batch.call[1])
                nn.functional.mse_loss(outputs.float(), batch.targets.float()).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert moved(naive) == 0
    assert moved(lambda block, pairs: refine_block(block, pairs, None, settings, 0)) > 0.5


def test_dtypes_flags_and_modes_are_as_before(make_pairs):
    block, pairs = make_pairs(dtype=torch.bfloat16)
    tensors, flags, modes = mixed(block)
    names = [name for name, _ in block.named_parameters()]
    with torch.no_grad():
        refine_block(block, pairs, None, RefineRecipe(preset="paper", epochs=1), 0)
    assert [name for name, _ in block.named_parameters()] == names
    assert_is(block, (block.state_dict(), flags, modes))
    assert {tensor.dtype for tensor in block.state_dict().values()} == {torch.bfloat16}
    assert any(not torch.equal(t, tensors[name]) for name, t in block.state_dict().items())


def test_it_can_be_trained_again(make_pairs):
    block, pairs = make_pairs(dtype=torch.bfloat16)
    settings = RefineRecipe(preset="paper", epochs=4, learning_rate=1e-3)
    first = refine_block(block, pairs, None, settings, 0)
    second = refine_block(block, pairs, None, settings, 0)
    assert second.start_loss < first.start_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_that_are_not_finite(make_pairs, dtype):
    block, pairs = make_pairs(dtype=dtype)
    state = mixed(block)
    pairs.targets[3][0, 0] = float("nan")
    with pytest.raises(NumericalError, match="block 7: the original block's outputs are not all"):
        refine_block(block, pairs, None, RefineRecipe(preset="paper"), 7)
    assert_is(block, state)


def test_targets_that_are_all_equal(make_pairs):
    block, pairs = make_pairs()
    state = mixed(block)
    constant = pairs.again(targets=[torch.ones_like(target) for target in pairs.targets])
    with pytest.raises(NumericalError, match="block 7: the original block's outputs are all equal"):
        refine_block(block, constant, None, RefineRecipe(preset="paper"), 7)
    assert_is(block, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loss_that_stops_being_finite(make_pairs, dtype):
    block, pairs = make_pairs(dtype=dtype)
    state = mixed(block)
    given = pairs.micro_batches

    def spoiled(sequences):
        if pairs.visits == 5:  # variance, loss, two steps of the first epoch, one of the second
            pairs.targets[5][0, 0] = float("inf")
        return given(sequences)

    pairs.micro_batches = spoiled
    settings = RefineRecipe(preset="paper", epochs=3, batch_sequences=4)
    with pytest.raises(NumericalError, match=r"block 2: .* not finite in step 4 \(epoch 2\)"):
        refine_block(block, pairs, None, settings, 2)
    assert_is(block, state)


def test_a_rate_that_blows_up(make_pairs):
    block, pairs = make_pairs(dtype=torch.float32)
    state = mixed(block)
    settings = RefineRecipe(preset="paper", epochs=9, learning_rate=1e15)
    with pytest.raises(NumericalError, match=r"smaller refine\.learning_rate"):
        refine_block(block, pairs, None, settings, 0)
    assert_is(block, state)


def test_held_out_targets_that_are_not_finite(make_pairs):
    block, pairs = make_pairs()
    state = mixed(block)
    held_out = pairs.again(targets=[target * float("nan") for target in pairs.targets])
    with pytest.raises(NumericalError, match="loss on 6 sequences is not finite after 0 epochs"):
        refine_block(block, pairs, held_out, RefineRecipe(preset="fast"), 0)
    assert_is(block, state)


def test_an_interrupt(make_pairs):
    block, pairs = make_pairs()
    state = mixed(block)
    given = pairs.micro_batches

    def interrupted(sequences):
        if pairs.visits == 4:
            raise KeyboardInterrupt
        return given(sequences)

    pairs.micro_batches = interrupted
    with pytest.raises(KeyboardInterrupt):
        refine_block(block, pairs, None, RefineRecipe(preset="paper", epochs=3), 0)
    assert_is(block, state)


class Root(nn.Module):
    """Finite at zero, with a slope that is not."""

    def __init__(self):
        super().__init__()
        self.linear = LowRankLinear(4, 4, 2, bias=False)
        nn.init.zeros_(self.linear.expand.weight)

    def forward(self, states):
        return states + self.linear(states).abs().sqrt()


def test_a_gradient_that_is_not_finite(make_pairs):
    _, pairs = make_pairs(dtype=torch.float32)
    pairs = pairs.again(targets=[target[:, :4] for target in pairs.targets])
    pairs.inputs = [states[:, :4] for states in pairs.inputs]
    pairs.calls = lambda _length: ((), {})
    with torch.random.fork_rng():
        block = Root()
    state = state_of(block)
    with pytest.raises(NumericalError, match=r"gradient is not finite in step 1 \(epoch 1\)"):
        refine_block(block, pairs, None, RefineRecipe(preset="paper"), 0)
    assert_is(block, state)


def test_masters_beyond_the_stored_range(make_pairs):
    block, _ = make_pairs(dtype=torch.float16)
    state = mixed(block)
    norm = block.input_layernorm.weight
    with (
        pytest.raises(NumericalError, match=r"left the range of torch\.float16"),
        master_parameters(block, [norm]),
        torch.no_grad(),
    ):
        norm.fill_(1e6)
    assert_is(block, state)


@pytest.mark.parametrize(
    ("stored", "product"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_products_are_fast_beside_masters_and_what_is_frozen(make_pairs, stored, product):
    block, pairs = make_pairs(dtype=stored, dense=("down_proj",))
    seen = set()
    for linear in (block.self_attn.q_proj.latent, block.mlp.down_proj):
        linear.register_forward_hook(lambda m, _, y: seen.add((m.weight.dtype, y.dtype)))
    refine_block(block, pairs, None, RefineRecipe(preset="paper", epochs=1), 0)
    assert seen == {(torch.promote_types(stored, torch.float32), product), (stored, product)}
