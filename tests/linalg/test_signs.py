import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimrank.linalg import fix_signs

relaxed = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@given(rows=st.integers(1, 9), columns=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
@relaxed
def test_the_largest_entry_of_each_column_is_positive(rows, columns, seed):
    basis = normal(seed, rows, columns)
    kept = basis.clone()
    fixed = fix_signs(basis)
    assert torch.equal(basis, kept)
    assert torch.equal(fixed.abs(), basis.abs())
    for before, after in zip(basis.mT, fixed.mT, strict=True):
        assert float(after[after.abs().argmax()]) > 0
        assert torch.equal(after, before) or torch.equal(after, -before)
    assert torch.equal(fix_signs(fixed), fixed)


@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@relaxed
def test_the_sign_of_the_input_is_forgotten(rows, seed):
    basis = normal(seed, rows, 4)
    flips = normal(seed + 1, 4).sign()
    assert torch.equal(fix_signs(basis * flips), fix_signs(basis))


def test_a_zero_column_stays_zero():
    fixed = fix_signs(torch.tensor([[0.0, -1.0], [0.0, 0.5]]))
    assert fixed.tolist() == [[0.0, 1.0], [0.0, -0.5]]
