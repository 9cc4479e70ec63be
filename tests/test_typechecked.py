"""Calls are checked in tests, those of functions within functions too."""

from typing import ParamSpec

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from typechecked import _known, checked


def make(kind):
    @jaxtyped(typechecker=checked)
    def within(value: kind) -> kind:
        return value if value else None

    return within


def test_they_are_checked_each_time_and_made_once():
    before = len(_known)
    for _ in range(3):
        whole, word = make(int), make(str)
        assert (whole(1), word("a")) == (1, "a")
        for function, wrong in ((whole, "a"), (word, 1)):
            with pytest.raises(TypeCheckError, match="checking the parameters"):
                function(wrong)
        for function, falsy in ((whole, 0), (word, "")):
            with pytest.raises(TypeCheckError, match="checking the return value"):
                function(falsy)
    assert len(_known) == before + 4  # parameters, and parameters with what is returned


def test_shapes_meet_those_of_the_same_call():
    @jaxtyped(typechecker=checked)
    def product(left: Float[Tensor, "a b"], right: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
        return left @ right

    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 3).mT[:2])


def test_hints_without_a_hash_are_taken():
    parameters = ParamSpec("parameters")

    def count(*values: parameters.args, **named: parameters.kwargs) -> int:
        return len(values) + len(named)

    assert checked(count)(1, 2, third=3) == 3
