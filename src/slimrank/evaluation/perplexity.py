"""Perplexity over windows of a text, all of it, in float32."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from slimrank.calibration import TokenWindows
from slimrank.errors import NumericalError, TextError
from slimrank.evaluation.result import EvalResult

CHUNK = 512  # tokens whose logits are in float32 at once
Track = Callable[[Iterable[Tensor], int], Iterable[Tensor]]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Int[Tensor, " tokens"],
    sequence_length: int = 2048,
    num_windows: int | None = None,
    track: Track = lambda windows, _total: windows,
) -> EvalResult:
    """Exponential of the mean cross-entropy of each token given those before it in its window.

    Windows do not overlap; in each, all tokens but the first are predicted. Without `num_windows`
    the whole text counts: what is left after the last full window is a shorter window.
    Cross-entropy is taken in float32, sums in float64.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model, dense or compressed; put into eval mode meanwhile.
    ids : Tensor of shape (tokens,), int64
        The text in the model's own tokens.
    sequence_length : int
        At least 2.
    num_windows : int, optional
        Take only the first ones.
    track : callable, optional
        Wraps the windows, given how many there are, to show progress.

    Returns
    -------
    EvalResult

    Raises
    ------
    TextError
        If the text is shorter than one window, or the model does not know one of its tokens.
    NumericalError
        If the loss of a window is not finite; nothing is skipped.

    Examples
    --------
    >>> class Uniform(nn.Module):  # every token is as likely as any other of four
    ...     def get_input_embeddings(self):
    ...         return nn.Embedding(4, 1)
    ...     def forward(self, input_ids, use_cache):
    ...         return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})
    >>> round(perplexity(Uniform(), torch.tensor([0, 1, 2, 3, 0]), sequence_length=3).value, 4)
    4.0
    """
    return windows_perplexity(model, cut_windows(ids, sequence_length, num_windows), track)


@torch.no_grad()
def windows_perplexity(
    model: nn.Module,
    windows: TokenWindows,
    track: Track = lambda windows, _total: windows,
) -> EvalResult:
    """Take the perplexity over given windows (see `perplexity`).

    Parameters
    ----------
    model : nn.Module
    windows : TokenWindows
        Each of at least 2 tokens.
    track : callable, optional

    Raises
    ------
    TextError
        If a window has one token only, or the model does not know one.
    NumericalError
        If the loss of a window is not finite.
    """
    if min(map(len, windows.windows)) < 2:
        raise TextError("a window needs at least 2 tokens: one to see, one to predict")
    windows.check_vocabulary(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    losses: list[tuple[float, int]] = []
    try:
        for number, window in enumerate(track(windows.windows, len(windows.windows))):
            losses.append(_window_loss(model, window, number))
    finally:
        model.train(was_training)
    return _result(losses, windows, time.perf_counter() - start)


def _result(losses: list[tuple[float, int]], windows: TokenWindows, seconds: float) -> EvalResult:
    """Perplexity and its standard error from the summed loss and token count of each window."""
    tokens = sum(count for _, count in losses)
    mean = sum(loss for loss, _ in losses) / tokens
    spread = sum((loss - count * mean) ** 2 for loss, count in losses)
    return EvalResult(
        metric="perplexity",
        value=math.exp(mean),
        stderr=math.exp(mean) * math.sqrt(spread) / tokens,
        mean_loss=mean,
        tokens=tokens,
        windows=len(losses),
        sequence_length=len(windows.windows[0]),
        data_fingerprint=windows.fingerprint(),
        seconds=seconds,
    )


def cut_windows(
    ids: Int[Tensor, " tokens"], length: int, num_windows: int | None = None
) -> TokenWindows:
    """Cut a text into the windows that `perplexity` takes.

    Parameters
    ----------
    ids : Tensor of shape (tokens,), int64
    length : int
        At least 2.
    num_windows : int, optional
        Only the first ones; all of the text if left out, its rest as a shorter window.

    Raises
    ------
    TextError
        If the text is shorter than one window, or holds fewer than asked for.

    Examples
    --------
    >>> [len(window) for window in cut_windows(torch.arange(10), 4).windows]
    [4, 4, 2]
    """
    if length < 2:
        raise TextError("a window needs at least 2 tokens: one to see, one to predict")
    if len(ids) < length:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}; give more text "
            "or a shorter --sequence-length"
        )
    available = len(ids) // length
    if num_windows is not None and not 1 <= num_windows <= available:
        raise TextError(f"{num_windows} windows were asked for; the text holds {available}")
    pieces: tuple[Tensor, ...] = torch.split(ids, length)
    if num_windows is not None:
        pieces = pieces[:num_windows]
    elif len(pieces[-1]) < 2:
        pieces = pieces[:-1]
    return TokenWindows(tuple(pieces))


def _window_loss(model: nn.Module, window: Tensor, number: int) -> tuple[float, int]:
    """Summed cross-entropy of a window, and how many tokens it predicted."""
    device = next(model.parameters(), window).device
    window = window.to(device)
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    loss = 0.0
    for start in range(0, len(logits), CHUNK):
        part, labels = logits[start : start + CHUNK], window[1 + start : 1 + start + CHUNK]
        loss += float(nn.functional.cross_entropy(part.float(), labels, reduction="sum"))
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss of window {number} is {loss}; the model or its dtype is broken, and no "
            "window is ever skipped"
        )
    return loss, len(window) - 1
