"""Train all blocks of a compressed model together, towards what the original model predicts.

AA-SVD trains one block at a time, so that a block makes up for its own error only. Together they
make up for one another's: the loss is the divergence of the model's predictions from the original's
at every position, of the very sequences that the factors were made from. Beyond both papers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimrank.calibration import (
    FINAL,
    ORIGINAL,
    SHIFTED,
    ActivationStore,
    RestOfModel,
    Streams,
    TokenWindows,
    call_checkpointed,
    default_batch_size,
    embed_streams,
    keep_final,
    stacked,
)
from slimrank.model import Anatomy, device_of
from slimrank.options import CompressionOptions
from slimrank.recipe import TuneRecipe
from slimrank.refine import MicroBatch, refine_block
from slimrank.report import RefinementReport


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the original model gives for some sequences, to train a compressed one by.

    Parameters
    ----------
    streams : Streams
        In front of the first block, with what the original gives behind its last one.
    """

    streams: Streams

    @classmethod
    def prepare(
        cls,
        model: Any,
        anatomy: Anatomy,
        calibration: TokenWindows,
        held_out: TokenWindows | None,
        options: CompressionOptions,
        store: ActivationStore,
    ) -> "Tuning":
        """Run the original model once.

        Parameters
        ----------
        model : PreTrainedModel
            Dense.
        anatomy : Anatomy
        calibration : TokenWindows
        held_out : TokenWindows or None
            To stop by.
        options : CompressionOptions
        store : ActivationStore
            Holds hidden states twice: in front of the blocks, and behind them.

        Raises
        ------
        ModelError
            If the model cannot be replayed block by block.
        """
        length = max(len(window) for window in calibration.windows)
        size = options.batch_size or default_batch_size(length)
        streams = embed_streams(model, anatomy, calibration, held_out, size, store)
        store.drop_kind(SHIFTED)
        keep_final(model, anatomy, streams)
        return cls(streams)

    def tune(self, model: Any, anatomy: Anatomy, settings: TuneRecipe) -> RefinementReport:
        """Train a compressed model in place; what is trained is as for `refine_block`.

        Each block is run again when its gradient is asked for, so that only one block's graph is
        held. Beside the model there are float32 masters of all that is trained, their gradients and
        the two moments of AdamW: 16 bytes for each number.

        Parameters
        ----------
        model : PreTrainedModel
            The one that this was prepared from, compressed.
        anatomy : Anatomy
        settings : TuneRecipe

        Returns
        -------
        RefinementReport
            With losses in nats a token.

        Raises
        ------
        RecipeError
            If there is nothing to train.
        NumericalError
            If a loss or a gradient is not finite; the model is then as it was.
        """
        blocks = list(model.get_submodule(anatomy.path).children())
        held_out = _Sequences(self.streams, blocks[0], is_held_out=True)
        return refine_block(
            _Stack(blocks, self.streams),
            _Sequences(self.streams, blocks[0]),
            held_out if held_out.num_sequences else None,
            settings.refinement(),
            len(blocks),
            rest=RestOfModel(model, anatomy, self.streams, len(blocks) - 1),
            what="the blocks together",
            section="tune",
        )


class _Stack(nn.Module):
    """All blocks as one."""

    def __init__(self, blocks: Sequence[nn.Module], streams: Streams) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.streams = streams

    def forward(self, hidden: Tensor, numbers: list[int]) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = call_checkpointed(block, hidden, self.streams.call(index, numbers))
        return hidden


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Some sequences in front of the first block (see `slimrank.refine.BlockData`)."""

    streams: Streams
    first: nn.Module
    is_held_out: bool = False

    @property
    def num_sequences(self) -> int:
        return self.streams.in_all[self.is_held_out]

    def micro_batches(self, sequences: Sequence[int]) -> Iterator[MicroBatch]:
        device = device_of(self.first)
        store = self.streams.store
        own = self.streams.own(sequences, self.streams.num_calibration * self.is_held_out)
        for numbers in self.streams.groups(own):
            yield MicroBatch(
                inputs=stacked(store, (ORIGINAL,), numbers).to(device),
                targets=stacked(store, (FINAL,), numbers).to(device),
                call=((), {"numbers": numbers}),
                numbers=tuple(numbers),
            )
