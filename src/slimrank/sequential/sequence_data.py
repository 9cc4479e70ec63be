"""What a block is trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimrank.calibration import SHIFTED, TARGET, BlockPair, Streams, stacked
from slimrank.model import device_of
from slimrank.refine import MicroBatch


@dataclass(frozen=True, slots=True)
class SequenceData:
    """Shifted inputs and original outputs of some sequences (see `slimrank.refine.BlockData`).

    Parameters
    ----------
    pair : BlockPair
    streams : Streams
        Both have passed the original block.
    is_held_out : bool
        Whether they are the held-out ones.
    """

    pair: BlockPair
    streams: Streams
    is_held_out: bool = False

    @property
    def num_sequences(self) -> int:
        """How many all processes have."""
        return self.streams.in_all[self.is_held_out]

    def micro_batches(self, sequences: Sequence[int]) -> Iterator[MicroBatch]:
        """Give the own ones of those sequences, a few at a time, on the device of the block."""
        device = device_of(self.pair.compressed)
        store = self.streams.store
        own = self.streams.own(sequences, self.streams.num_calibration * self.is_held_out)
        for numbers in self.streams.groups(own):
            yield MicroBatch(
                inputs=stacked(store, (SHIFTED,), numbers).to(device),
                targets=stacked(store, (TARGET,), numbers).to(device),
                call=self.streams.call(self.pair.index, numbers),
                numbers=tuple(numbers),
            )
