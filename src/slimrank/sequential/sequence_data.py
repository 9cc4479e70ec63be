"""What a block is trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimrank.calibration import SHIFTED, TARGET, BlockPair, Streams, stacked
from slimrank.refine import MicroBatch


@dataclass(frozen=True, slots=True)
class SequenceData:
    """Shifted inputs and original outputs of some sequences (see `slimrank.refine.BlockData`).

    Parameters
    ----------
    pair : BlockPair
    streams : Streams
        Both have passed the original block.
    sequences : range
        Of the streams.
    """

    pair: BlockPair
    streams: Streams
    sequences: range

    @property
    def num_sequences(self) -> int:
        """How many there are."""
        return len(self.sequences)

    def micro_batches(self, sequences: Sequence[int]) -> Iterator[MicroBatch]:
        """Give those sequences, a few at a time, on the device of the block."""
        device = next(self.pair.compressed.parameters()).device
        store = self.streams.store
        for numbers in self.streams.groups(self.sequences[number] for number in sequences):
            yield MicroBatch(
                inputs=stacked(store, (SHIFTED,), numbers).to(device),
                targets=stacked(store, (TARGET,), numbers).to(device),
                call=self.streams.call(self.pair.index, numbers),
                numbers=tuple(numbers),
            )
