"""Steps of AdamW under a schedule, each on the summed gradients of some micro-batches."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from slimrank import processes
from slimrank.errors import NumericalError

Batch = TypeVar("Batch")


@runtime_checkable
class Schedule(Protocol):
    """Settings of the steps: see `slimrank.recipe.RefineRecipe`."""

    @property
    def learning_rate(self) -> float:
        """At its peak."""
        ...

    @property
    def warmup(self) -> float:
        """Share of the steps over which the rate grows."""
        ...

    @property
    def final_learning_rate(self) -> float:
        """Share of the peak at which the cosine ends."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of AdamW."""
        ...

    @property
    def clip_norm(self) -> float | None:
        """Largest norm of the gradient."""
        ...


def learning_rate(step: int, steps: int, settings: Schedule) -> float:
    """Rate of one step: a line up to the peak, then half a cosine down to the final rate.

    Parameters
    ----------
    step : int
        From 0.
    steps : int
        Of the whole training.
    settings : Schedule

    Examples
    --------
    >>> from slimrank.recipe import RefineRecipe
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


class Steps(Generic[Batch]):
    """A number of steps, taken one by one.

    Parameters
    ----------
    trained : sequence of nn.Parameter
    measure : callable
        From a micro-batch to the loss summed over it, and how many elements that is the sum of.
    settings : Schedule
    count : int
        How many steps there will be.
    unit : float
        What the loss is divided by, beside the number of elements.
    fault : callable
        From the number of a step, from 1, to what the error says if it is not finite.

    Attributes
    ----------
    done : int
        Steps that were taken.
    """

    def __init__(
        self,
        trained: Sequence[nn.Parameter],
        measure: Callable[[Batch], tuple[Tensor, int]],
        settings: Schedule,
        count: int,
        unit: float,
        fault: Callable[[int], str],
    ) -> None:
        self._trained, self._measure, self._settings = trained, measure, settings
        self._count, self._unit, self._fault = count, unit, fault
        self._optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.done = 0

    def take(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Take one step; gives the loss summed over its micro-batches, and their elements.

        Raises
        ------
        NumericalError
            If the loss or its gradient is not finite.
        """
        total, elements = self._accumulate(batches)
        norm = nn.utils.clip_grad_norm_(self._trained, self._settings.clip_norm or math.inf)
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            raise NumericalError(self._fault(self.done + 1))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self._count, self._settings)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1
        return total, elements

    def _accumulate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Sum the gradients of all micro-batches, then divide: as if they were one batch."""
        totals, own = [], 0
        for batch in batches:
            with torch.enable_grad():
                found, new = self._measure(batch)
                torch.autograd.backward(found)
            totals.append(float(found.detach()))
            own += new
        total, elements = processes.sums(math.fsum(totals), own)
        _add_gradients_up(self._trained)
        for parameter in self._trained:
            if parameter.grad is not None:  # an expert that no token of this step reached has none
                parameter.grad.div_(elements * self._unit)
        return total, elements

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by names with the number of a parameter in front."""
        state = self._optimizer.state_dict()["state"]
        return {f"{n}.{key}": value for n, kept in state.items() for key, value in kept.items()}

    def go_on(self, done: int, moments: dict[str, Tensor]) -> None:
        """Go on as if so many steps had been taken here.

        Parameters
        ----------
        done : int
        moments : dict of str to Tensor
            What `moments` gave after them.

        Raises
        ------
        ValueError
            If they are not of these parameters.
        """
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in moments.items():
            number, _, key = name.partition(".")
            kept.setdefault(int(number), {})[key] = value
        for index, values in kept.items():
            shape = self._trained[index].shape if index < len(self._trained) else None
            if {key: value.shape for key, value in values.items()} != _shapes(shape):
                raise ValueError(f"the moments of parameter {index} are not those of AdamW")
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": kept})
        self.done = done


def _shapes(shape: torch.Size | None) -> dict[str, torch.Size | None]:
    """What AdamW remembers of a parameter."""
    return {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}


def _add_gradients_up(parameters: Sequence[nn.Parameter]) -> None:
    """Sum them over all processes; those that none of them has stay away."""
    if processes.count() == 1:
        return
    known = processes.largest([float(parameter.grad is not None) for parameter in parameters])
    for parameter, is_known in zip(parameters, known, strict=True):
        if is_known:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = processes.add_up(own)


def seed_of(seed: int, index: int) -> int:
    """One for each pair, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little")
