"""What is summed over the loss's gradients in one block."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimrank import processes
from slimrank.calibration.backward import Pulled
from slimrank.errors import NumericalError
from slimrank.linalg import MomentAccumulator, float64_device, in_float64
from slimrank.model import Anatomy, device_of


@dataclass(frozen=True, slots=True)
class BlockGradients:
    """What the loss's gradients are like in one block.

    g is the gradient by a token's outputs of the sum of all tokens' cross-entropies, in nats.

    Parameters
    ----------
    index : int
        Of the block.
    metrics : dict of str to Tensor of shape (out, out)
        For each targeted linear, the sum of ``g gᵀ`` over all that it put out, divided by the
        number of predicted tokens. For an expert the sum is over the tokens it saw, so with the
        second moment of these tokens' inputs the loss in the metric is a share of nats a token of
        the text. Zero for a linear that did not run.
    output_metric : Tensor of shape (hidden, hidden)
        The same at the block's output.
    row_weights : dict of str to Tensor of shape (out,), float64
        See `collect_gradients`; empty if not asked for.
    mean_gradients : dict of str to Tensor of shape (out, in)
        Gradients by the weights, divided by the number of predicted tokens; empty if not asked for.
    """

    index: int
    metrics: dict[str, Tensor]
    output_metric: Float[Tensor, "hidden hidden"]
    row_weights: dict[str, Tensor]
    mean_gradients: dict[str, Tensor]


class BlockGradientSums:
    """What is summed over the windows for one block.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
        Of the linears that are looked at.
    index : int
        Of the block.
    weight_gradients : bool
        Sum row weights too. Windows must then come one at a time.
    mean_gradients : bool
        Sum the gradients by the weights too.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        index: int,
        weight_gradients: bool,
        mean_gradients: bool = False,
    ) -> None:
        self.index, self.path = index, f"{anatomy.path}.{index}"
        self.needs_inputs = weight_gradients or mean_gradients
        self.device = device_of(model.get_submodule(self.path))
        shapes = {
            site.name.removeprefix(f"{self.path}."): site.shape
            for group in anatomy.groups[index]
            for site in group.sites
        }
        widths = {name: shape.out_features for name, shape in shapes.items()}
        self._metrics = {name: MomentAccumulator(n, self.device) for name, n in widths.items()}
        self._output: MomentAccumulator | None = None
        place = float64_device(self.device)
        self._rows = {
            name: torch.zeros(n, dtype=torch.float64, device=place)
            for name, n in widths.items()
            if weight_gradients
        }
        self._gradients = {
            name: torch.zeros(s.out_features, s.in_features, dtype=torch.float64, device=place)
            for name, s in shapes.items()
            if mean_gradients
        }
        self._windows = 0

    @property
    def names(self) -> list[str]:
        """Of the linears, within the block."""
        return list(self._metrics)

    def add_output(self, gradient: Float[Tensor, "batch length hidden"]) -> None:
        """Add gradients by the block's output.

        Raises
        ------
        NumericalError
            If one is not finite, with the block's name.
        """
        self._windows += len(gradient)
        if self._output is None:
            self._output = MomentAccumulator(gradient.shape[-1], self.device)
        _add(self._output, gradient.to(self.device), self.path)

    def add(self, pulled: Pulled, predicted: int) -> None:
        """Add what reached the linears; each window predicts `predicted` tokens.

        Raises
        ------
        NumericalError
            If a gradient is not finite, with the linear's name.
        """
        for name, gradients in reversed(
            pulled.outputs.items()
        ):  # the nearest to a NaN's cause first
            for gradient in gradients:
                _add(self._metrics[name], gradient, f"{self.path}.{name}")
            if not (self.needs_inputs and gradients):
                continue
            pairs = zip(gradients, pulled.inputs[name], strict=True)
            summed = torch.as_tensor(sum(_rows_of(g).mT @ _rows_of(x).to(g) for g, x in pairs))
            if self._rows:
                norms = torch.linalg.vector_norm(summed, dim=1)
                self._rows[name] += (in_float64(norms) / predicted).square()
            if self._gradients:
                self._gradients[name] += summed.to(self._gradients[name].device)

    def result(self, predicted: int, dtype: torch.dtype) -> BlockGradients:
        """Means over all predicted tokens and windows, of all processes; to be called once."""
        assert self._output is not None
        windows = processes.sums(self._windows)[0]
        return BlockGradients(
            index=self.index,
            metrics={
                f"{self.path}.{name}": _mean(self._metrics.pop(name), predicted).to(dtype)
                for name in self.names
            },
            output_metric=_mean(self._output, predicted).to(dtype),
            row_weights={
                f"{self.path}.{name}": processes.add_up(rows) / windows
                for name, rows in self._rows.items()
            },
            mean_gradients={
                f"{self.path}.{name}": processes.add_up(self._gradients.pop(name))
                .div_(predicted)
                .to(dtype)
                for name in list(self._gradients)
            },
        )


def _rows_of(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1])


def _add(accumulator: MomentAccumulator, gradient: Tensor, name: str) -> None:
    try:
        accumulator.update(gradient)
    except NumericalError as error:
        raise NumericalError(
            f"the gradient of the loss at the outputs of {name} is not finite, or too large to "
            "square; load the model in bfloat16 or float32 if it is in float16"
        ) from error


def _mean(accumulator: MomentAccumulator, predicted: int) -> Tensor:
    """Sum over all rows of all processes, by the number of predicted tokens."""
    found = accumulator.taken().original
    assert found is not None
    return processes.add_up(found.mul_(accumulator.tokens / predicted))
