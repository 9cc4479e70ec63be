"""The optimiser of one block, its schedule, and the order of sequences."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from slimrank import processes
from slimrank.errors import NumericalError
from slimrank.recipe import RefineRecipe
from slimrank.refine.data import BlockData
from slimrank.refine.losses import Loss


def learning_rate(step: int, steps: int, settings: RefineRecipe) -> float:
    """Rate of one step: a line up to the peak, then half a cosine down to the final rate.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        Of the whole training.
    settings : RefineRecipe

    Examples
    --------
    >>> settings = RefineRecipe(preset="paper")
    >>> [round(1e6 * learning_rate(step, 200, settings), 2) for step in (0, 1, 19, 109, 199)]
    [5.0, 10.0, 100.0, 55.0, 10.0]
    """
    warmup_steps = round(settings.warmup * steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (steps - warmup_steps)
    final = settings.final_learning_rate
    return settings.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


class BlockTraining:
    """Epochs of AdamW over the calibration sequences, and losses between them.

    All losses that are returned are means in the loss's own unit.

    Parameters
    ----------
    block : nn.Module
    trained : sequence of nn.Parameter
        Those of `block` that ask for gradients.
    calibration : BlockData
    measure : Loss
    settings : RefineRecipe
    index : int
        Position of the block.
    what : str
        What messages call it.

    Raises
    ------
    NumericalError
        By `loss` and `train_epoch`, when a loss or a gradient is not finite.
    """

    def __init__(
        self,
        block: nn.Module,
        trained: Sequence[nn.Parameter],
        calibration: BlockData,
        measure: Loss,
        settings: RefineRecipe,
        index: int,
        what: str,
    ) -> None:
        self._block, self._trained, self._calibration = block, trained, calibration
        self._measure, self._settings, self._what = measure, settings, what
        self._optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._steps_an_epoch = math.ceil(calibration.num_sequences / settings.batch_sequences)
        self._step = 0
        self._generator = torch.Generator().manual_seed(_seed(settings.seed, index))

    @torch.no_grad()
    def loss(self, data: BlockData) -> float:
        """Of the parameters as they are, on all sequences of `data`."""
        totals, own = [], 0
        for batch in data.micro_batches(range(data.num_sequences)):
            found, new = self._measure.total(self._block, batch)
            totals.append(float(found))
            own += new
        total, elements = processes.sums(math.fsum(totals), own)
        loss = total / elements / self._measure.unit if elements else math.nan
        if not math.isfinite(loss):
            raise NumericalError(
                f"training {self._what}: the loss on {data.num_sequences} sequences is "
                f"not finite after {self._step // self._steps_an_epoch} epochs; the block is as it "
                "was"
            )
        return loss

    def train_epoch(self) -> float:
        """Take each sequence once; the loss is that of the steps as they were taken."""
        sequences = list(range(self._calibration.num_sequences))
        if self._settings.shuffle:
            sequences = torch.randperm(len(sequences), generator=self._generator).tolist()
        size = self._settings.batch_sequences
        total, elements = 0.0, 0.0
        for start in range(0, len(sequences), size):
            step_total, step_elements = self._train_step(sequences[start : start + size])
            total, elements = total + step_total, elements + step_elements
        return total / elements / self._measure.unit

    def _train_step(self, sequences: Sequence[int]) -> tuple[float, float]:
        total, elements = self._accumulate(sequences)
        norm = nn.utils.clip_grad_norm_(self._trained, self._settings.clip_norm or math.inf)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            epoch = self._step // self._steps_an_epoch + 1
            raise NumericalError(
                f"training {self._what}: the loss or its gradient is not finite in "
                f"step {self._step + 1} (epoch {epoch}); the block is as it was; try a smaller "
                "refine.learning_rate"
            )
        steps = self._settings.epochs * self._steps_an_epoch
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, steps, self._settings)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        return total, elements

    def _accumulate(self, sequences: Sequence[int]) -> tuple[float, float]:
        """Sum the gradients of all micro-batches, then divide: as if they were one batch."""
        totals, own = [], 0
        for batch in self._calibration.micro_batches(sequences):
            with torch.enable_grad():
                found, new = self._measure.total(self._block, batch)
                torch.autograd.backward(found)
            totals.append(float(found.detach()))
            own += new
        total, elements = processes.sums(math.fsum(totals), own)
        _add_gradients_up(self._trained)
        scale = elements * (self._measure.unit if self._settings.scale_loss else 1.0)
        for parameter in self._trained:
            if parameter.grad is not None:  # an expert that no token of this step reached has none
                parameter.grad.div_(scale)
        return total, elements


def _add_gradients_up(parameters: Sequence[nn.Parameter]) -> None:
    """Sum them over all processes; those that none of them has stay away."""
    if processes.count() == 1:
        return
    known = processes.largest([float(parameter.grad is not None) for parameter in parameters])
    for parameter, is_known in zip(parameters, known, strict=True):
        if is_known:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = processes.add_up(own)


def _seed(seed: int, index: int) -> int:
    """One for each pair, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
