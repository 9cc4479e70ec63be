"""Epochs over the sequences of one block, and losses between them."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from slimrank import processes
from slimrank.errors import NumericalError
from slimrank.recipe import RefineRecipe
from slimrank.refine.data import BlockData, MicroBatch
from slimrank.refine.losses import Loss
from slimrank.refine.steps import Steps, seed_of


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
        self._block, self._calibration = block, calibration
        self._measure, self._settings, self._what = measure, settings, what
        self._steps_an_epoch = math.ceil(calibration.num_sequences / settings.batch_sequences)
        self._steps: Steps[MicroBatch] = Steps(
            trained,
            lambda batch: measure.total(block, batch),
            settings,
            settings.epochs * self._steps_an_epoch,
            measure.unit if settings.scale_loss else 1.0,
            self._fault,
        )
        self._generator = torch.Generator().manual_seed(seed_of(settings.seed, index))

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
                f"not finite after {self._steps.done // self._steps_an_epoch} epochs; the block "
                "is as it was"
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
            batches = self._calibration.micro_batches(sequences[start : start + size])
            step_total, step_elements = self._steps.take(batches)
            total, elements = total + step_total, elements + step_elements
        return total / elements / self._measure.unit

    def _fault(self, step: int) -> str:
        epoch = (step - 1) // self._steps_an_epoch + 1
        return (
            f"training {self._what}: the loss or its gradient is not finite in step {step} (epoch "
            f"{epoch}); the block is as it was; try a smaller refine.learning_rate"
        )
