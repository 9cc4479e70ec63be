"""What stands behind a block: the later blocks, the final norm and the head, with gradients."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimrank.calibration.head import head_logits
from slimrank.calibration.replay import Call, blocks_of, call_block
from slimrank.calibration.store import stacked
from slimrank.calibration.streams import ORIGINAL, Streams
from slimrank.model import Anatomy

FINAL = "final"


@torch.no_grad()
def keep_final(model: nn.Module, anatomy: Anatomy, streams: Streams) -> None:
    """Take the original stream through all blocks, and keep what comes out at the end.

    Under ``("final", number)``, in the model's dtype: as much as one stream takes. The original
    stream itself stays in front of the first block.

    Parameters
    ----------
    model : nn.Module
        With nothing in it replaced yet.
    anatomy : Anatomy
    streams : Streams
        In front of the first block.
    """
    for numbers in streams.walk():
        hidden = stacked(streams.store, (ORIGINAL,), numbers)
        for index, block in enumerate(blocks_of(model, anatomy)):
            hidden = call_block(block, hidden, streams.call(index, numbers))
        streams.store.put_rows((FINAL,), numbers, hidden)


@dataclass(frozen=True, slots=True)
class RestOfModel:
    """What stands behind one block, for gradients that go through it and leave nothing in it.

    Only one block's graph is ever held: each later block is run again when its gradient is asked
    for.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; its later blocks are as in the original. Parameters get no gradients,
        and are left as they are, ``requires_grad`` included.
    anatomy : Anatomy
    streams : Streams
        After `keep_final`.
    index : int
        Of the block that this is the rest behind.

    Notes
    -----
    Memory beside the model: the hidden states in front of each later block, and one block's graph.
    """

    model: nn.Module
    anatomy: Anatomy
    streams: Streams
    index: int

    def states(
        self, hidden: Float[Tensor, "batch length hidden"], numbers: Sequence[int]
    ) -> Float[Tensor, "batch length hidden"]:
        """Take a block's outputs through all later blocks.

        Parameters
        ----------
        hidden : Tensor of shape (batch, length, hidden)
        numbers : sequence of int
            Of the sequences, all of one kind.
        """
        dtype = self._dtype(numbers)
        later = blocks_of(self.model, self.anatomy)[self.index + 1 :]
        for index, block in enumerate(later, self.index + 1):
            call = self.streams.call(index, numbers)
            hidden = call_checkpointed(block, hidden.to(dtype), call, is_frozen=True)
        return hidden.to(dtype)

    def wanted(self, numbers: Sequence[int]) -> Float[Tensor, "batch length hidden"]:
        """What the original model gives behind its last block, on the CPU."""
        return stacked(self.streams.store, (FINAL,), list(numbers))

    def logits(
        self, states: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Predictions from states behind the last block, each position by itself."""
        inside = f"{self.anatomy.path}."
        outside = [p for name, p in self.model.named_parameters() if not name.startswith(inside)]
        with _frozen(outside):
            device = next(self.model.parameters()).device
            return head_logits(self.model, self.anatomy, states.to(device))

    def _dtype(self, numbers: Sequence[int]) -> torch.dtype:
        """What the model hands from block to block; one that is trained may give a wider one."""
        return self.streams.store.get((FINAL, numbers[0])).dtype


def call_checkpointed(
    block: nn.Module, hidden: Tensor, call: Call, is_frozen: bool = False
) -> Tensor:
    """Do what `call_block` does, but keep no graph: the block is run again for its gradient.

    Parameters
    ----------
    block : nn.Module
    hidden : Tensor of shape (batch, length, hidden)
    call : tuple
        The arguments beside the hidden states.
    is_frozen : bool
        Let its parameters get no gradients.
    """

    def run(states: Tensor) -> Tensor:
        with _frozen(block.parameters() if is_frozen else ()):
            # it is run again from the same states, so a block may not change them in place
            return call_block(block, states.clone(), call)

    output: Tensor = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
    return output


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Record nothing for the gradients of these; flags are as before afterwards."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
