"""What is summed while tokens pass: moments, energies of outputs, errors of a block."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimrank import processes
from slimrank.calibration.hooks import inputs_of
from slimrank.calibration.joint import joint_moments
from slimrank.linalg import DriftAccumulator, MomentAccumulator, Moments, in_float64
from slimrank.model import InputGroup
from slimrank.report import BlockError


class GroupSums:
    """Moments of one group, over all tokens and over those of the last calibration sequence.

    Parameters
    ----------
    group : InputGroup
    needs : frozenset of str
        As `slimrank.methods.Method.needs`.
    device : torch.device
    """

    def __init__(self, group: InputGroup, needs: frozenset[str], device: torch.device) -> None:
        self.group = group
        self._needs = needs
        width = group.in_features
        self._moments = [MomentAccumulator(width, device) for _ in range(2)]
        self._drifts = [DriftAccumulator(width, device) for _ in range(2)]

    def add(self, original: Tensor | None, shifted: Tensor | None, is_last: bool) -> None:
        """Add tokens of the streams that are looked at.

        Raises
        ------
        NumericalError
            If an activation is not finite, with the linear's name.
        """
        arriving = original if shifted is None else shifted
        assert arriving is not None
        with inputs_of(self.group.sites[0].name):
            centred = self._moments[is_last].update(arriving)
            if original is not None and shifted is not None:
                self._drifts[is_last].update(original, shifted, centred)

    def results(self) -> tuple[Moments, Moments]:
        """Over all tokens of all processes, and over the last own sequence."""
        self._moments[0].merge(self._moments[1])
        self._drifts[0].merge(self._drifts[1])
        last = self._result(1)
        return joint_moments(self._result(0)), last

    def _result(self, which: int) -> Moments:
        found = self._moments[which].taken()
        if "shifted" not in self._needs:
            return found
        drift = self._drifts[which].result()
        return Moments(original=None, tokens=found.tokens, shifted=found.original, drift=drift)


class OutputEnergy:
    """Mean squared norm of a linear's outputs, its bias left out."""

    def __init__(self, block: nn.Module, name: str) -> None:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        self._linear, self._sum, self._tokens = linear, 0.0, 0

    def mean(self) -> float:
        """Over all tokens that were counted, in all processes."""
        total, tokens = processes.sums(self._sum, self._tokens)
        return total / max(tokens, 1)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count what the linear gives."""

        def hook(_m: nn.Module, _a: Any, output: Tensor) -> None:
            tokens = output.reshape(-1, output.shape[-1])
            tokens = tokens if self._linear.bias is None else tokens - self._linear.bias
            self._sum += float(_norms(tokens).square().sum())
            self._tokens += len(tokens)

        handle = self._linear.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@dataclass(slots=True)
class BlockErrorSums:
    """Over tokens: squared error, squared norm of what was wanted, and distance of directions."""

    error: float = 0.0
    energy: float = 0.0
    distance: float = 0.0
    tokens: int = 0

    def add(self, wanted: Tensor, given: Tensor) -> None:
        """Add tokens of both blocks."""
        wanted, given = wanted.float(), given.float()
        apart, *sizes = map(_norms, (wanted - given, wanted, given))
        product = 2 * sizes[0] * sizes[1]
        unlike = (apart.square() - (sizes[0] - sizes[1]).square()) / product  # law of cosines
        self.error += float(apart.square().sum())
        self.energy += float(sizes[0].square().sum())
        self.distance += float(torch.where(product > 0, unlike, 1.0).sum())
        self.tokens += wanted.shape[:-1].numel()

    def merge_all(self) -> None:
        """Add what the sums of all other processes saw."""
        found = processes.sums(self.error, self.energy, self.distance, self.tokens)
        self.error, self.energy, self.distance = found[:3]
        self.tokens = round(found[3])

    @property
    def is_finite(self) -> bool:
        """Whether all that was added is."""
        return all(map(math.isfinite, (self.error, self.energy, self.distance)))

    def result(self) -> BlockError:
        """Means over tokens."""
        return BlockError(
            relative_error=self.error / (self.energy or 1.0),
            cosine_distance=max(self.distance / max(self.tokens, 1), 0.0),
        )


def _norms(tokens: Tensor) -> Tensor:
    """Norm of each token, in one pass over it; float64, to be squared and summed."""
    norms: Tensor = torch.linalg.vector_norm(tokens.float(), dim=-1)
    return in_float64(norms)
