"""Block influence: how much a block turns the hidden states that pass through it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from slimrank import processes
from slimrank.linalg import in_float64


@dataclass(slots=True)
class BlockInfluence:
    """Mean over tokens of ``1 − cos(h_in, h_out)``: near 0 for a block that changes little.

    Windows hold no padding, so none is averaged in. The last block is measured before the final
    norm. The authors' code differs in both: it pads short texts and counts the padding, and takes
    the hidden states that transformers reports, of which the last are those after the norm.

    References
    ----------
    ShortGPT (arXiv 2403.03853), equation 1; Swift-SVD (arXiv 2604.01609), section 4, where it is
    the importance β of a block.

    Examples
    --------
    >>> influence = BlockInfluence()
    >>> influence.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> influence.value
    0.5
    """  # noqa: E501

    total: float = 0.0
    tokens: int = 0

    def add(
        self, entering: Float[Tensor, "*batch hidden"], leaving: Float[Tensor, "*batch hidden"]
    ) -> None:
        """Take in the hidden states of some tokens, in front of a block and behind it.

        Parameters
        ----------
        entering, leaving : Tensor of shape (..., hidden)
            Of the same tokens in the same order.
        """
        before, after = entering.flatten(0, -2).float(), leaving.flatten(0, -2).float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self.total += float((1 - in_float64(cosine)).sum())
        self.tokens += len(before)

    def merge_all(self) -> None:
        """Take in what those of all other processes have."""
        total, tokens = processes.sums(self.total, self.tokens)
        self.total, self.tokens = total, round(tokens)

    @property
    def value(self) -> float:
        """The mean; 0.0 without tokens."""
        return self.total / self.tokens if self.tokens else 0.0
