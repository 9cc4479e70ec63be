"""How to run a recipe: what changes nothing in the result beyond rounding."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Track = Callable[[Iterable[int], str], Iterable[int]]


def untracked(steps: Iterable[int], _what: str) -> Iterable[int]:
    """Show no progress."""
    return steps


@dataclass(frozen=True, slots=True)
class CompressionOptions:
    """How to run: never changes the result beyond rounding, and is not saved.

    Parameters
    ----------
    device : str, optional
        Where forwards and solves run: 'cpu', 'cuda', 'cuda:1'; or 'mps', which has no float64, so
        that solves are on the CPU. Default: where the model is.
    batch_size : int, optional
        Windows at once; by default about 4,096 tokens.
    memory : int, optional
        Bytes of activations, and of statistics that are kept to the end, to hold in memory; the
        rest is spilled to disk. No limit if left out.
    stream : bool
        Leave the weights of a folder in their files, and work on one block at a time; in `compress`
        finished blocks go to disk and stay there too. They come to `device` in turns.
    remote_code : bool
        Write the modelling file too, by which the folder loads without slimrank installed.
    track : callable
        Wraps the loop over blocks, given a description, to show progress.
    """

    device: str | None = None
    batch_size: int | None = None
    memory: int | None = None
    stream: bool = False
    remote_code: bool = False
    track: Track = untracked
