"""The divergence of a compressed model's predictions from the dense model's, on whole sequences."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slimrank.calibration import TokenWindows
from slimrank.errors import NumericalError
from slimrank.healing.predictor import Predictor
from slimrank.model import device_of
from slimrank.refine import few_positions, reduced_precision, summed_divergence


@dataclass(frozen=True, slots=True)
class Distillation:
    """A student beside its teacher.

    ``KL(p ‖ p')`` at every position, where p is the teacher's prediction and p' the student's, in
    float32. Logits of a few positions are held at a time, and made again for the gradient. Products
    of the student are in bfloat16 if it is in bfloat16 or float16.

    Parameters
    ----------
    student, teacher : Predictor
    """

    student: Predictor
    teacher: Predictor

    def total(self, ids: Int[Tensor, "batch length"]) -> tuple[Tensor, int]:
        """Sum over the positions of some sequences, with gradients, and how many there are."""
        with torch.no_grad():
            wanted = self.teacher.states(ids)
        given = self.states(ids)
        again = partial(checkpoint, self._part, use_reentrant=False, preserve_rng_state=False)
        parts = [again(given[:, few], wanted[:, few]) for few in few_positions(given)]
        return torch.stack(parts).sum(), ids.numel()

    def states(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length hidden"]:
        """What the student gives behind its last block."""
        with self._reduced():
            return self.student.states(ids)

    def predictions(self, given: Tensor) -> Tensor:
        """What the student makes of its states."""
        with self._reduced():
            return self.student.predictions(given)

    def _part(self, given: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            aim = self.teacher.predictions(wanted)
        return summed_divergence(self.predictions(given), aim)

    def _reduced(self) -> AbstractContextManager[None]:
        """By the dtype of the embedding, which is not trained."""
        return reduced_precision(self.student.model.get_input_embeddings().weight)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Sequences that are not trained on, and what the teacher gives behind its last block.

    Parameters
    ----------
    distillation : Distillation
    batches : tuple of (Tensor, Tensor)
        Token ids, and the teacher's states, on the CPU.
    """

    distillation: Distillation
    batches: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, distillation: Distillation, windows: TokenWindows, size: int) -> "HeldOut":
        """Run the teacher once.

        Parameters
        ----------
        distillation : Distillation
        windows : TokenWindows
        size : int
            Sequences at once.
        """
        teacher = distillation.teacher
        batches = ((ids, teacher.states(ids).cpu()) for ids in windows.batches(size))
        return cls(distillation, tuple(batches))

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Divergence of the student as it is, in nats a token, and its perplexity.

        Raises
        ------
        NumericalError
            If one of them is not finite.
        """
        divergences, losses = [], []
        for ids, wanted in self.batches:
            given = self.distillation.states(ids)
            for few in few_positions(given):
                found = self.distillation.predictions(given[:, few])
                aim = self._aim(wanted[:, few])
                divergences.append(float(summed_divergence(found, aim)))
                losses.append(_loss(found, ids[:, 1:][:, few]))
        tokens = sum(ids.numel() for ids, _ in self.batches)
        return self._mean(divergences, tokens), math.exp(self._mean(losses, self._predicted))

    @torch.no_grad()
    def teacher_perplexity(self) -> float:
        """Perplexity of the teacher on the same tokens.

        Raises
        ------
        NumericalError
            If it is not finite.
        """
        losses = [
            _loss(self._aim(wanted[:, few]), ids[:, 1:][:, few])
            for ids, wanted in self.batches
            for few in few_positions(wanted)
        ]
        return math.exp(self._mean(losses, self._predicted))

    def _aim(self, wanted: Tensor) -> Tensor:
        teacher = self.distillation.teacher
        return teacher.predictions(wanted.to(device_of(teacher.model)))

    @property
    def _predicted(self) -> int:
        """Tokens that are predicted: all but the first of each sequence."""
        return sum(ids[:, 1:].numel() for ids, _ in self.batches)

    def _mean(self, values: list[float], count: int) -> float:
        mean = math.fsum(values) / count if all(map(math.isfinite, values)) else math.nan
        if not math.isfinite(mean):
            raise NumericalError(
                "healing: the loss on the held-out sequences is not finite; nothing was written; "
                "try a smaller learning rate"
            )
        return mean


def _loss(
    found: Float[Tensor, "batch positions vocabulary"], labels: Int[Tensor, "batch labels"]
) -> float:
    """Cross-entropy of the tokens that follow, summed; the last position has none."""
    known = found[:, : labels.shape[1]]
    return -float(known.gather(-1, labels[..., None].to(known.device)).sum())
