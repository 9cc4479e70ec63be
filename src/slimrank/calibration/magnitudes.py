"""Mean magnitudes of what arrives at linears."""

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from slimrank import processes
from slimrank.calibration.hooks import Taker, inputs_of, taking_inputs
from slimrank.calibration.joint import own_windows
from slimrank.calibration.windows import TokenWindows
from slimrank.errors import NumericalError
from slimrank.linalg import in_float64
from slimrank.model import Anatomy


class MagnitudeSums:
    """Sum of ``|x|`` over tokens, for one group of linears.

    Examples
    --------
    >>> sums = MagnitudeSums(2)
    >>> sums.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> sums.mean.tolist()
    [2.0, 1.0]
    """

    def __init__(self, features: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(features, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """Add the tokens of ``(..., features)``."""
        rows = inputs.detach().reshape(-1, len(self._sum))
        added = in_float64(rows).abs().sum(dim=0).cpu()
        if not bool(added.isfinite().all()):
            raise NumericalError("an activation is NaN or infinite")
        self._sum += added
        self.tokens += len(rows)

    @property
    def mean(self) -> Float64[Tensor, " features"]:
        """Over the tokens; zero if there were none."""
        return self._sum / max(self.tokens, 1)

    def merge_all(self) -> None:
        """Add what the sums of all other processes saw."""
        self.tokens = round(processes.sums(self.tokens)[0])
        processes.add_up(self._sum)


@torch.no_grad()
def collect_magnitudes(
    model: nn.Module, anatomy: Anatomy, windows: TokenWindows, batch_size: int
) -> dict[str, Tensor]:
    """Take all windows through the model, and average ``|x|`` at its linears.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
        Of the linears whose inputs are wanted.
    windows : TokenWindows
    batch_size : int
        Windows at once.

    Returns
    -------
    dict of str to Tensor of shape (in,), float64
        By linear; those of one group share theirs.

    Raises
    ------
    NumericalError
        If an activation is not finite, with the linear's name.

    References
    ----------
    ASVD (arXiv 2312.05821), equation 6.
    """
    groups = [group for block in anatomy.groups for group in block]
    sums = {group.sites[0].name: MagnitudeSums(group.in_features) for group in groups}
    device = next(model.parameters()).device
    with taking_inputs(model, {name: _adder(name, total) for name, total in sums.items()}):
        for ids in own_windows(windows).batches(batch_size):
            model(input_ids=ids.to(device), use_cache=False)
    for total in sums.values():
        total.merge_all()
    return {site.name: sums[group.sites[0].name].mean for group in groups for site in group.sites}


def _adder(name: str, total: MagnitudeSums) -> Taker:
    def add(inputs: Tensor) -> None:
        with inputs_of(name):
            total.add(inputs)

    return add
