"""Steps over the text, checks on held-out sequences between them, and what is kept of both."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from slimrank.calibration import TokenWindows
from slimrank.checkpoint import HealSnapshot, HealState
from slimrank.errors import CheckpointError
from slimrank.healing.distillation import HeldOut
from slimrank.options import Track
from slimrank.recipe import HealRecipe
from slimrank.refine import Best, Steps, seed_of, set_values
from slimrank.report import HealCheck

SPACING = 300.0  # seconds between snapshots, at least


class Training:
    """Of some parameters of a student, which hold float32 masters meanwhile.

    Parameters
    ----------
    held_out : HeldOut
        Has student and teacher.
    trained : sequence of nn.Parameter
    text : TokenWindows
        To train on.
    recipe : HealRecipe
    size : int
        Sequences at once.
    state : HealState
        Gone on with if something is kept there.

    Attributes
    ----------
    planned : int
        Steps, if it does not stop before.
    """

    def __init__(
        self,
        held_out: HeldOut,
        trained: Sequence[nn.Parameter],
        text: TokenWindows,
        recipe: HealRecipe,
        size: int,
        state: HealState,
    ) -> None:
        self._held_out, self._trained, self._text = held_out, trained, text
        self._recipe, self._size, self._state = recipe, size, state
        self._an_epoch = math.ceil(len(text.windows) / recipe.batch_sequences)
        self.planned = recipe.epochs * self._an_epoch
        self._every = math.ceil(self.planned / recipe.checks)
        self._steps: Steps[Tensor] = Steps(
            trained, held_out.distillation.total, recipe, self.planned, 1.0, self._fault
        )

    def run(self, start: HealCheck, track: Track) -> tuple[tuple[HealCheck, ...], int]:
        """Train until the text is used up, or held-out sequences gain no more; leave the best.

        Parameters
        ----------
        start : HealCheck
            Before the first step.
        track : callable
            Wraps the loop over steps.

        Returns
        -------
        checks : tuple of HealCheck
            `start` among them.
        kept : int
            After how many steps the parameters are those that are left; 0 is the start.

        Raises
        ------
        NumericalError
            If a loss or a gradient is not finite.
        CheckpointError
            If what was kept does not fit, or the disk refuses to keep more.
        """
        checks, best = [start], Best(self._trained, start.divergence)
        if self._state.last is not None:
            checks = self._go_on(self._state.last, best)
        began = time.perf_counter() - checks[-1].seconds
        saved = time.perf_counter()
        total = tokens = 0.0
        for number in track(range(self._steps.done, self.planned), "healing"):
            if self._is_over(checks, best):
                break
            found, count = self._steps.take(self._batches(number))
            total, tokens = total + found, tokens + count
            if self._steps.done % self._every and self._steps.done < self.planned:
                continue
            checks.append(self._check(checks[-1], began, total, tokens))
            best.is_improved(self._steps.done, checks[-1].divergence)
            total = tokens = 0.0
            if time.perf_counter() - saved >= SPACING:
                self._keep(checks, best)
                saved = time.perf_counter()
        best.put_back()
        return tuple(checks), best.number

    def _is_over(self, checks: list[HealCheck], best: Best) -> bool:
        """Whether the last checks brought nothing."""
        return sum(check.step > best.number for check in checks) >= self._recipe.patience

    def _check(self, last: HealCheck, began: float, total: float, tokens: float) -> HealCheck:
        found, perplexity = self._held_out.measure()
        return HealCheck(
            step=self._steps.done,
            tokens=last.tokens + int(tokens),
            seconds=time.perf_counter() - began,
            divergence=found,
            perplexity=perplexity,
            trained_divergence=total / tokens,
        )

    def _batches(self, number: int) -> Iterator[Tensor]:
        """Sequences of one step; their order is drawn anew for each epoch."""
        epoch, step = divmod(number, self._an_epoch)
        generator = torch.Generator().manual_seed(seed_of(self._recipe.seed, epoch))
        order = torch.randperm(len(self._text.windows), generator=generator).tolist()
        size = self._recipe.batch_sequences
        chosen = (self._text.windows[n] for n in order[step * size : (step + 1) * size])
        return TokenWindows(tuple(chosen)).batches(self._size)

    def _keep(self, checks: list[HealCheck], best: Best) -> None:
        """Keep all that decides how it goes on."""
        step = self._steps.done
        tensors: dict[str, Tensor] = {
            f"master.{n}": parameter for n, parameter in enumerate(self._trained)
        }
        tensors |= {f"moment.{name}": value for name, value in self._steps.moments().items()}
        if best.number != step:
            tensors |= {f"best.{n}": value for n, value in enumerate(best.values)}
        snapshot = HealSnapshot(step=step, best_step=best.number, checks=tuple(checks))
        self._state.save(snapshot, tensors)

    def _go_on(self, last: HealSnapshot, best: Best) -> list[HealCheck]:
        """Take up what was kept."""
        tensors = self._state.tensors()
        try:
            set_values(self._trained, self._values(tensors, "master"))
            self._steps.go_on(
                last.step,
                {
                    name.removeprefix("moment."): value
                    for name, value in tensors.items()
                    if name.startswith("moment.")
                },
            )
            kept = "master" if last.best_step == last.step else "best"
            losses = {check.step: check.divergence for check in last.checks}
            best.number, best.loss = last.best_step, losses[last.best_step]
            best.values = self._values(tensors, kept)
        except (LookupError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"what is kept in {self._state.folder} does not fit: {error}; delete it"
            ) from error
        return list(last.checks)

    def _values(self, tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
        """Values of one kind, where the parameters are."""
        values = []
        for number, parameter in enumerate(self._trained):
            value = tensors[f"{kind}.{number}"]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise ValueError(f"{kind}.{number} has another shape or dtype")
            values.append(value.to(parameter.device))
        return values

    def _fault(self, step: int) -> str:
        return (
            f"healing: the loss or its gradient is not finite in step {step} of {self.planned}; "
            "nothing was written; try a smaller learning rate"
        )
