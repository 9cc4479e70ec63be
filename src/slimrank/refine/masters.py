"""Float32 copies that are trained in the place of a block's parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimrank.errors import NumericalError


@contextmanager
def master_parameters(
    block: nn.Module, trained: Sequence[nn.Parameter], rate: str = "refine.learning_rate"
) -> Iterator[None]:
    """Train some parameters of a block in float32 or better, and round them once, at the end.

    Inside, they hold their masters and ask for gradients; no other parameter does, and dropout is
    off. At the end all flags, modes and dtypes are as before, and no gradient is left. If anything
    is raised inside, an interrupt too, the parameters are bitwise as before.

    Parameters
    ----------
    block : nn.Module
    trained : sequence of nn.Parameter
        Of `block`.
    rate : str
        What the error calls the learning rate.

    Raises
    ------
    NumericalError
        If a master is not finite in the dtype it came from.
    """
    modes = [(module, module.training) for module in block.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    stored = [parameter.data for parameter in trained]
    try:
        block.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False).grad = None
        for parameter, values in zip(trained, stored, strict=True):
            parameter.data = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
            parameter.requires_grad_(True)
        yield
        stored = _rounded(trained, stored, rate)
    finally:
        for parameter, values in zip(trained, stored, strict=True):
            parameter.grad = None
            parameter.data = values
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


class Best:
    """The values of some parameters that were best so far, by a loss on held-out text.

    Parameters
    ----------
    parameters : sequence of nn.Parameter
    loss : float
        Of their values now, which count as number 0.

    Attributes
    ----------
    number : int
    loss : float
    values : list of Tensor

    Examples
    --------
    >>> parameter = nn.Parameter(torch.zeros(1))
    >>> best = Best([parameter], 0.5)
    >>> _ = parameter.data.fill_(1)
    >>> best.is_improved(1, 0.6), best.is_improved(2, 0.4), best.is_improved(3, 0.4), best.number
    (False, True, False, 2)
    >>> best.put_back()
    >>> parameter.item()
    1.0
    """

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float) -> None:
        self._parameters = parameters
        self.number, self.loss, self.values = 0, loss, copy_values(parameters)

    def is_improved(self, number: int, loss: float) -> bool:
        """Take the values as they are now if they are better; tell whether they are."""
        if loss >= self.loss:
            return False
        self.number, self.loss, self.values = number, loss, copy_values(self._parameters)
        return True

    def put_back(self) -> None:
        """Go back to the best values."""
        set_values(self._parameters, self.values)


def copy_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Values as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def set_values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Go back to what `copy_values` took."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _rounded(trained: Sequence[nn.Parameter], stored: Sequence[Tensor], rate: str) -> list[Tensor]:
    rounded = [p.data.to(values.dtype) for p, values in zip(trained, stored, strict=True)]
    for values in rounded:
        if not bool(values.isfinite().all()):
            raise NumericalError(
                f"a trained parameter left the range of {values.dtype}; all are as they were; "
                f"try a smaller {rate}"
            )
    return rounded
