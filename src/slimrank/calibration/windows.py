"""Windows of token ids, drawn by a generator of their own.

A window holds no padding, ever: texts of unequal length become windows of unequal length, which
are run in batches of equal ones. So no padding token can enter a moment.
"""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from slimrank.errors import NumericalWarning, TextError


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of token ids, each a tensor of shape (length,), int64.

    Examples
    --------
    >>> windows = TokenWindows((torch.tensor([1, 2, 3]), torch.tensor([4, 5])))
    >>> windows.tokens, [tuple(batch.shape) for batch in windows.batches(8)]
    (5, [(1, 2), (1, 3)])
    """

    windows: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.windows or any(window.numel() == 0 for window in self.windows):
            raise TextError("there are no calibration windows, or one of them is empty")

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(len(window) for window in self.windows)

    def batches(self, size: int) -> Iterator[Int[Tensor, "batch length"]]:
        """Batches of windows of one length, at most `size` each, shortest first."""
        by_length: dict[int, list[Tensor]] = {}
        for window in self.windows:
            by_length.setdefault(len(window), []).append(window)
        for length in sorted(by_length):
            same = by_length[length]
            for start in range(0, len(same), size):
                yield torch.stack(same[start : start + size])

    def fingerprint(self) -> str:
        """SHA-256 of the ids and lengths."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(8, "little"))
            digest.update(window.to("cpu", torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, size: int) -> None:
        """Hold all ids against the number of embeddings.

        Raises
        ------
        TextError
            If an id is outside, with the id.
        """
        largest = max(int(window.max()) for window in self.windows)
        smallest = min(int(window.min()) for window in self.windows)
        if smallest < 0 or largest >= size:
            bad = smallest if smallest < 0 else largest
            raise TextError(
                f"token id {bad} is outside the model's {size} embeddings; is this the model's "
                "own tokenizer?"
            )


def draw_windows(
    ids: Int[Tensor, " tokens"], num_sequences: int, length: int, generator: torch.Generator
) -> TokenWindows:
    """Draw windows that do not overlap.

    The text is cut into windows from a random offset, and some of them are taken in random order.

    Parameters
    ----------
    ids : Tensor of shape (tokens,), int64
    num_sequences, length : int
    generator : torch.Generator

    Raises
    ------
    TextError
        If the text is shorter than one window.

    Warns
    -----
    NumericalWarning
        If the text holds fewer windows than asked; all of them are then used.

    Examples
    --------
    >>> windows = draw_windows(torch.arange(10), 2, 4, torch.Generator().manual_seed(0))
    >>> [len(window) for window in windows.windows]
    [4, 4]
    """
    if len(ids) < length:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one sequence of {length}; give more "
            "text or a shorter --sequence-length"
        )
    available = len(ids) // length
    if available < num_sequences:
        warnings.warn(
            f"the text holds {available} sequences of {length} tokens; {num_sequences} were "
            "asked for, all of it is used",
            NumericalWarning,
            stacklevel=2,
        )
    slack = len(ids) - available * length
    offset = int(torch.randint(slack + 1, (1,), generator=generator))
    order = torch.randperm(available, generator=generator)[:num_sequences]
    starts = offset + order * length
    return TokenWindows(tuple(ids[s : s + length].clone() for s in starts.tolist()))


def hold_out(windows: TokenWindows, count: int) -> tuple[TokenWindows, TokenWindows | None]:
    """Part the last windows from the others: to choose by, not to calibrate on.

    Parameters
    ----------
    windows : TokenWindows
    count : int
        How many; at most half of them are parted.

    Returns
    -------
    calibration : TokenWindows
    held_out : TokenWindows or None
        None if there is only one window, or none was asked for.

    Examples
    --------
    >>> windows = TokenWindows((torch.tensor([1]), torch.tensor([2]), torch.tensor([3])))
    >>> [part.tokens for part in hold_out(windows, 1)]
    [2, 1]
    """
    count = min(count, len(windows.windows) // 2)
    if count == 0:
        return windows, None
    return TokenWindows(windows.windows[:-count]), TokenWindows(windows.windows[-count:])


def from_padded(
    ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
) -> TokenWindows:
    """Windows from a padded batch, as a tokenizer returns it; the padding is cut off.

    Parameters
    ----------
    ids : Tensor of shape (batch, length)
    attention_mask : Tensor of shape (batch, length), optional
        Nonzero where a token is real. Left and right padding both do.

    Raises
    ------
    TextError
        If a row has no real token.

    Examples
    --------
    >>> ids = torch.tensor([[0, 0, 5], [6, 7, 8]])
    >>> [w.tolist() for w in from_padded(ids, ids != 0).windows]
    [[5], [6, 7, 8]]
    """
    if attention_mask is None:
        return TokenWindows(tuple(ids))
    return TokenWindows(
        tuple(row[mask.bool()] for row, mask in zip(ids, attention_mask, strict=True))
    )


def default_batch_size(sequence_length: int, tokens: int = 4096) -> int:
    """Windows at once: about `tokens` tokens, at least one window.

    Examples
    --------
    >>> default_batch_size(1024), default_batch_size(8192)
    (4, 1)
    """
    return max(1, tokens // sequence_length)
