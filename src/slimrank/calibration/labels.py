"""The token that each position should predict: the next one, or one the model itself draws."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimrank.calibration.windows import TokenWindows
from slimrank.errors import TextError
from slimrank.linalg import in_float64


@dataclass(frozen=True, slots=True)
class Labels:
    """One label for each position of each window but the last.

    Parameters
    ----------
    windows : TokenWindows
        Each of at least 2 tokens. Without `draws`, the label is the next token: the gradients of
        the loss on this very text (the "empirical Fisher").
    draws : tuple of Tensor or None
        For each window a number in [0, 1) for each label, float64. The label is then drawn from
        what the model predicts, as Fisher's information asks; that number picks it, so neither the
        grouping of windows nor the order in which they pass changes a label beyond rounding.

    Examples
    --------
    >>> windows = TokenWindows((torch.tensor([2, 0, 1]),))
    >>> Labels(windows).at(0, 0, torch.zeros(2, 3)).tolist()
    [0, 1]
    >>> sure = torch.tensor([[0.0, 9e9, 0.0], [0.0, 0.0, 9e9]])
    >>> Labels.drawn(windows, torch.Generator()).at(0, 0, sure).tolist()
    [1, 2]
    """

    windows: TokenWindows
    draws: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if min(map(len, self.windows.windows)) < 2:
            raise TextError("a window needs at least 2 tokens: one to see, one to predict")

    @classmethod
    def drawn(cls, windows: TokenWindows, generator: torch.Generator) -> "Labels":
        """Labels that the model draws; `generator`, on the CPU, settles all of them at once."""
        draws = (
            torch.rand(len(window) - 1, dtype=torch.float64, generator=generator)
            for window in windows.windows
        )
        return cls(windows, tuple(draws))

    @property
    def count(self) -> int:
        """Labels in all windows."""
        return self.windows.tokens - len(self.windows.windows)

    def at(
        self, number: int, start: int, logits: Float[Tensor, "tokens vocabulary"]
    ) -> Int[Tensor, " tokens"]:
        """Labels of some positions of one window.

        Parameters
        ----------
        number : int
            Of the window.
        start : int
            First position.
        logits : Tensor of shape (tokens, vocabulary)
            What the model predicts from there on.

        Returns
        -------
        Tensor of shape (tokens,), int64
        """
        stop = start + len(logits)
        if self.draws is None:
            return self.windows.windows[number][start + 1 : stop + 1].to(logits.device)
        shares = in_float64(logits).softmax(-1).cumsum_(-1)
        places = self.draws[number][start:stop, None].to(shares) * shares[:, -1:]
        chosen = torch.searchsorted(shares, places, right=True).squeeze(1)
        return chosen.clamp_max(logits.shape[-1] - 1).to(logits.device)
