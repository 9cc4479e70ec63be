"""Blocks of tiny models with linears of low rank, and pairs to train them on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimrank.linalg import decompose_outputs
from slimrank.nn import LowRankLinear
from slimrank.refine import MicroBatch


class Pairs:
    """Sequences in memory, `size` at once where they are equally long."""

    def __init__(self, inputs, targets, calls, size=2):
        self.inputs, self.targets, self.calls, self.size = inputs, targets, calls, size
        self.visits = 0

    @property
    def num_sequences(self):
        return len(self.inputs)

    def micro_batches(self, sequences):
        self.visits += 1
        numbers = list(sequences)
        while numbers:
            length = len(self.inputs[numbers[0]])
            here = [n for n in numbers[: self.size] if len(self.inputs[n]) == length]
            numbers = [n for n in numbers if n not in here]
            yield MicroBatch(
                torch.stack([self.inputs[n] for n in here]),
                torch.stack([self.targets[n] for n in here]),
                self.calls(length),
            )

    def again(self, size=None, targets=None):
        """The same inputs, otherwise grouped, or with other targets."""
        return Pairs(self.inputs, targets or self.targets, self.calls, size or self.size)


def truncated(linear: nn.Linear, rank: int) -> LowRankLinear:
    factors = decompose_outputs(linear.weight.detach().double()).truncate(rank)
    return LowRankLinear.from_factors(linear, factors)


@pytest.fixture(scope="session")
def make_pairs(make_model: Callable[..., Any]) -> Callable[..., tuple[nn.Module, Pairs]]:
    """`make_pairs(family, dtype=float64, lengths=(8,) * 6, dense=())`: a block and its pairs."""

    def make(family="llama", dtype=torch.float64, lengths=(8,) * 6, dense=()):
        model = make_model(family).to(dtype).requires_grad_(True)
        original = model.model.layers[0]
        generator = torch.Generator().manual_seed(1)
        width = model.config.hidden_size

        def calls(length):
            positions = torch.arange(length)[None]
            empty = torch.zeros(1, length, width, dtype=dtype)
            return (), {"position_embeddings": model.model.rotary_emb(empty, positions)}

        def run(states):
            args, kwargs = calls(len(states))
            return original(states[None], *args, **kwargs)[0]

        with torch.no_grad():
            states = [torch.randn(n, width, generator=generator).to(dtype) for n in lengths]
            targets = [run(x) for x in states]
            noise = [0.1 * torch.randn(n, width, generator=generator).to(dtype) for n in lengths]
            inputs = [x + e for x, e in zip(states, noise, strict=True)]
        block = copy.deepcopy(original)
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear) and name.rpartition(".")[2] not in dense:
                block.set_submodule(name, truncated(linear, 6))
        return block, Pairs(inputs, targets, calls)

    return make
