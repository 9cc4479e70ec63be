"""One phase of a run: what is held at once, where, by what holds it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

HEAP_PIECE = 2**25
"""Pieces that glibc takes from its heap are smaller; it keeps what is freed between them."""

HEAP_SHARE = 0.4
"""Holes between them, as a share of what is held in them, measured to be 0.3 to 0.6."""

LIBRARIES = 2**26
"""What linear algebra keeps for itself on one thread, measured to be 40 to 70 MB."""

Part = tuple[str, int, int]  # what, bytes, bytes of its largest piece


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run takes place.

    Parameters
    ----------
    has_device : bool
        Whether blocks run on an accelerator.
    limit : int or None
        Bytes that a store holds in memory.
    heap_piece : int
        Bytes of the smallest piece that is not in glibc's heap.
    """

    has_device: bool = False
    limit: int | None = None
    heap_piece: int = HEAP_PIECE


@dataclass(slots=True)
class Phase:
    """What is alive at once in one phase.

    Parameters
    ----------
    name : str
    place : Place
    memory, device, disk : dict of str to int
        Bytes by what holds them.
    in_heap : int
        Bytes in memory that are in small pieces.

    Examples
    --------
    >>> phase = Phase("calibration", Place(limit=100))
    >>> phase.hold("model", 50, is_mapped=True)
    >>> phase.store([("hidden states", 160, 10)])
    >>> phase.memory, phase.disk, phase.in_heap
    ({'model': 50, 'hidden states': 100}, {'spilled': 60}, 100)
    """

    name: str
    place: Place
    memory: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    in_heap: int = 0

    def beside(self, name: str) -> "Phase":
        """Another phase, in which all of this one's is held too."""
        found = replace(self, name=name)
        found.memory, found.device, found.disk = (
            dict(self.memory),
            dict(self.device),
            dict(self.disk),
        )
        return found

    def hold(
        self,
        what: str,
        size: int | float,
        piece: int | float | None = None,
        *,
        is_mapped: bool = False,
        on_host: bool = False,
    ) -> None:
        """Hold something more.

        Parameters
        ----------
        what : str
        size : int
            Bytes.
        piece : int, optional
            Bytes of the largest of the pieces that it is in; of one piece if left out.
        is_mapped : bool
            Pages of a file, which no heap holds.
        on_host : bool
            In memory even where blocks run on an accelerator.
        """
        size = int(size)
        if size <= 0:
            return
        place = self.device if self.place.has_device and not on_host else self.memory
        place[what] = place.get(what, 0) + size
        piece = size if piece is None else piece
        if place is self.memory and not is_mapped and piece < self.place.heap_piece:
            self.in_heap += size

    def store(self, parts: Iterable[Part]) -> None:
        """Hold what one store of activations has: in memory up to the limit, on disk beyond it."""
        room = self.place.limit
        for what, size, piece in parts:
            kept = size if room is None else min(size, room)
            room = None if room is None else room - kept
            self.hold(what, kept, piece, on_host=True)
            self.keep("spilled", size - kept)

    def keep(self, what: str, size: int | float) -> None:
        """Hold something on disk."""
        if size > 0:
            self.disk[what] = self.disk.get(what, 0) + int(size)

    def finished(self) -> "Phase":
        """The same with what allocator and libraries take on top."""
        found = self.beside(self.name)
        found.memory["allocator"] = int(HEAP_SHARE * self.in_heap) + LIBRARIES
        return found

    @property
    def memory_bytes(self) -> int:
        """In memory."""
        return sum(self.memory.values())

    @property
    def device_bytes(self) -> int:
        """In the accelerator's memory."""
        return sum(self.device.values())

    @property
    def disk_bytes(self) -> int:
        """On disk."""
        return sum(self.disk.values())


def largest(phases: Iterable[Phase]) -> Phase:
    """The one that holds most: in memory and on the accelerator together."""
    return max(phases, key=lambda phase: phase.memory_bytes + phase.device_bytes)
