"""Sequences on their way through the blocks, in any grouping.

Blocks are handed more than hidden states (masks, rotary embeddings). That is recorded for each
sequence alone, and once for two at a time: what doubles then grows with the batch, what stays the
same is shared. So any sequences of one length can be put together, in any number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimrank import processes
from slimrank.calibration.joint import own_windows
from slimrank.calibration.replay import Call, check_replay, equal_calls, record_calls
from slimrank.calibration.store import ActivationStore
from slimrank.calibration.widening import Kind, can_widen
from slimrank.calibration.windows import TokenWindows
from slimrank.model import Anatomy

ORIGINAL, SHIFTED = "original", "shifted"


@dataclass(frozen=True, slots=True)
class Streams:
    """Sequences by number: calibration ones first, then held-out ones.

    Parameters
    ----------
    store : ActivationStore
        Holds hidden states under ``("original", number)`` and ``("shifted", number)``.
    kinds : tuple of Kind
    kind_of, lengths : tuple of int
        For each sequence; its length in tokens.
    num_calibration : int
        How many of them calibrate.
    size : int
        Sequences at once.
    in_all : tuple of int
        Calibration and held-out sequences of all processes. Those above are this one's own, and
        are numbered by themselves.
    all_lengths : tuple of int
        Tokens of each calibration sequence of all processes.
    """

    store: ActivationStore
    kinds: tuple[Kind, ...]
    kind_of: tuple[int, ...]
    lengths: tuple[int, ...]
    num_calibration: int
    size: int
    in_all: tuple[int, int]
    all_lengths: tuple[int, ...]

    @property
    def calibration(self) -> range:
        """Numbers of the calibration sequences."""
        return range(self.num_calibration)

    @property
    def held_out(self) -> range:
        """Numbers of the held-out sequences."""
        return range(self.num_calibration, len(self.kind_of))

    @staticmethod
    def place(number: int) -> int:
        """Place of an own calibration sequence among those of all processes."""
        return processes.number() + number * processes.count()

    def own(self, places: Iterable[int], first: int = 0) -> list[int]:
        """Own numbers of those sequences that are at these places among those of all processes.

        Parameters
        ----------
        places : iterable of int
            Counted among calibration sequences, or among held-out ones.
        first : int
            Own number of the first one of these.
        """
        size, own = processes.count(), processes.number()
        return [first + place // size for place in places if place % size == own]

    def groups(self, sequences: Iterable[int]) -> Iterator[list[int]]:
        """Put sequences of one kind together, at most `size` of them, in order."""
        by_kind: dict[int, list[int]] = {}
        for number in sequences:
            by_kind.setdefault(self.kind_of[number], []).append(number)
        for kind, numbers in by_kind.items():
            size = 1 if self.kinds[kind].double is None else self.size
            for start in range(0, len(numbers), size):
                yield numbers[start : start + size]

    def walk(self) -> Iterator[list[int]]:
        """All sequences, the last calibration one on its own: its tokens check the moments."""
        yield from self.groups(self.calibration[:-1])
        yield [self.num_calibration - 1]
        yield from self.groups(self.held_out)

    def call(self, block: int, sequences: Sequence[int]) -> Call:
        """What a block is called with for these sequences, all of one kind."""
        return self.kinds[self.kind_of[sequences[0]]].call(block, len(sequences))


@torch.no_grad()
def embed_streams(
    model: nn.Module,
    anatomy: Anatomy,
    calibration: TokenWindows,
    held_out: TokenWindows | None,
    size: int,
    store: ActivationStore,
) -> Streams:
    """Put the hidden states in front of the first block into both streams, of own sequences.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
    calibration : TokenWindows
    held_out : TokenWindows or None
    size : int
        Sequences at once.
    store : ActivationStore

    Raises
    ------
    ModelError
        If running block by block does not give what the model gives.
    """
    all_lengths = tuple(map(len, calibration.windows))
    in_all = len(calibration.windows), len(held_out.windows) if held_out else 0
    calibration = own_windows(calibration)
    windows = [*calibration.windows, *processes.share(held_out.windows if held_out else ())]
    check_replay(model, anatomy, windows[0][None, :16])
    singles: list[tuple[Call, ...]] = []
    first_of: list[int] = []
    second_of: dict[int, int] = {}
    kind_of: list[int] = []
    for number, window in enumerate(windows):
        hidden, calls = record_calls(model, anatomy, window[None])
        store.put((ORIGINAL, number), hidden[0])
        store.put((SHIFTED, number), hidden[0])
        alike = (
            k
            for k, known in enumerate(singles)
            if len(windows[first_of[k]]) == len(window) and equal_calls(known, calls)
        )
        kind = next(alike, len(singles))
        if kind == len(singles):
            singles.append(calls)
            first_of.append(number)
        else:
            second_of.setdefault(kind, number)
        kind_of.append(kind)
    kinds = []
    for kind, single in enumerate(singles):
        double = None
        if kind in second_of:
            pair = torch.stack([windows[first_of[kind]], windows[second_of[kind]]])
            _, double = record_calls(model, anatomy, pair)
            double = double if can_widen(single, double) else None
        kinds.append(Kind(single, double))
    lengths = tuple(map(len, windows))
    own = len(calibration.windows)
    return Streams(store, tuple(kinds), tuple(kind_of), lengths, own, size, in_all, all_lengths)
