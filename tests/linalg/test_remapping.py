"""Factors in the memory of one dense matrix: what they were, in the bytes that are counted."""

import pytest
import torch

from slimrank.errors import NumericalError
from slimrank.linalg import Factors, remap, remapped_bytes


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_hand_worked_example():
    # scales 2/127 and 1/64, rounded up to bfloat16; codes 127 and -64 below and above in one number
    factors = Factors(torch.tensor([[127.0], [0.5]]), torch.tensor([[-64.0]]))
    stored = remap(factors)
    assert stored.left_scale.item() == 1.0
    assert stored.right_scale.item() == pytest.approx(64 / 127, rel=2**-7)
    assert stored.packed[0].item() & 0xFF == 127
    assert stored.packed[0].item() >> 8 == -round(64 / stored.right_scale.item())
    assert stored.packed[1].item() == 0x3F00  # 0.5
    assert stored.further().tolist() == [[0.5]]


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_remapped_factors_are_those_they_were(rows, columns, dtype):
    factors = Factors(random(rows, 5), random(5, columns, seed=1))
    stored = remap(factors, dtype)
    assert stored.packed.shape == (max(rows, columns), 5)
    tensors = (stored.packed, stored.left_scale, stored.right_scale)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert total == remapped_bytes(rows, columns, 5)
    shorter = min(rows, columns)
    again = stored.factors()
    for exact, found in ((factors.left, again.left), (factors.right.mT, again.right.mT)):
        steps = exact[:shorter].abs().amax(0) / 127
        slack = steps / 2 + exact[:shorter].abs() * 2 * torch.finfo(dtype).eps
        assert ((exact - found.double())[:shorter].abs() <= slack).all()
        assert torch.equal(exact[shorter:].to(dtype), found[shorter:])


def test_remapping_refuses_what_does_not_fit():
    with pytest.raises(NumericalError, match="cannot pack"):
        remap(Factors(torch.tensor([[1.0], [1e9]]), torch.ones(1, 1)), torch.float16)


def test_remapping_is_for_16_bits():
    with pytest.raises(NumericalError, match=r"torch\.float32 is no type of 16 bits"):
        remap(Factors(torch.ones(2, 1), torch.ones(1, 1)), torch.float32)


def test_scales_may_be_cast_and_the_further_rows_stay_what_they_are():
    stored = remap(Factors(random(9, 3), random(3, 5, seed=1)))
    cast = stored._replace(
        left_scale=stored.left_scale.float(), right_scale=stored.right_scale.float()
    )
    assert cast.left().dtype == cast.right().dtype == torch.float32
    assert torch.equal(cast.left()[5:], stored.left()[5:].float())
    gap = (cast.left() - stored.left().float()).abs()
    assert (gap <= cast.left().abs() * torch.finfo(torch.bfloat16).eps).all()
