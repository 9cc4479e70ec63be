"""Moments held against tokens: the last calibration sequence, in both streams."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from slimrank.calibration import ARRIVED, INPUT, Streams, gap_on_tokens
from slimrank.linalg import Factors, Moments, anchored_loss, float64_device, in_float64, output_loss
from slimrank.methods import Method
from slimrank.model import InputGroup
from slimrank.nn import LowRankLinear

DIRECTIONS = 16


@dataclass(frozen=True, slots=True)
class LastTokens:
    """Inputs of a group of linears in the last calibration sequence, and what was summed of them.

    Parameters
    ----------
    original, arriving : Tensor of shape (tokens, in), float32
        Of the streams that the method looks at; one tensor if it looks at one stream.
    moments : Moments
        Of these very tokens.
    """

    original: Tensor
    arriving: Tensor
    moments: Moments

    @classmethod
    def of(
        cls,
        group: InputGroup,
        method: Method,
        streams: Streams,
        moments: Moments,
        device: torch.device,
    ) -> "LastTokens":
        """Read what both passes have kept; for a group that saw tokens."""
        key, last = group.sites[0].name, streams.num_calibration - 1
        place = float64_device(device)
        rows = [
            streams.store.get((kind, key, last)).to(place, torch.float32).flatten(0, -2)
            for kind, stream in ((INPUT, "original"), (ARRIVED, "shifted"))
            if stream in method.needs
        ]
        return cls(rows[0], rows[-1], moments)

    def check(self, name: str, weight: Tensor, layer: LowRankLinear, method: Method) -> float:
        """Hold the loss by the moments against the error of a replacement, token by token.

        Both are taken in a few random directions of the outputs: each is a loss of its own, by the
        same moments, so that a moment that does not fit its tokens shows in any of them.

        Parameters
        ----------
        name : str
        weight : Tensor of shape (out, in)
            What is replaced.
        layer : LowRankLinear
        method : Method

        Returns
        -------
        float
            Relative gap.

        Raises
        ------
        NumericalError
            If they disagree (see `slimrank.calibration.gap_on_tokens`).
        """
        drift, anchor = self.moments.drift, getattr(method, "anchor", 1.0)
        dense, compressed = _in_directions(weight.detach(), layer.factors())
        outputs = self.original @ dense.float().mT
        energy = wanted_energy = _energy(outputs)
        wanted = outputs
        if drift is not None and anchor != 1:
            wanted = outputs + (1 - anchor) * ((self.arriving - self.original) @ dense.float().mT)
            wanted_energy = _energy(wanted)
        seen = _energy(wanted - self.arriving @ compressed.right.float().mT)
        least = 1e-6 * wanted_energy
        if drift is None:  # whatever metric the method has: the moments are what is checked
            expected = output_loss(dense, compressed, self.moments.arriving)
        else:
            known = replace(self.moments, output_energy=energy)
            expected = anchored_loss(dense, compressed, known, anchor)
        if drift is not None and seen < 1e-2 * wanted_energy:
            # The loss is then a difference of energies, known to 1e-7 of them.
            least = 1e-4 * (wanted_energy + _energy(self.arriving @ dense.float().mT))
        return gap_on_tokens(name, seen, expected, least)


def _in_directions(weight: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
    """The parts of both maps along the same random directions of their outputs; float64."""
    sketch = _directions(len(weight)).to(float64_device(weight.device))
    right = (sketch @ in_float64(factors.left)) @ in_float64(factors.right)
    return sketch @ in_float64(weight), Factors(torch.eye(DIRECTIONS).to(right), right)


@cache
def _directions(rows: int) -> Tensor:
    """Random directions of `rows` outputs, on the CPU; the same for every linear of that size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(DIRECTIONS, rows, generator=generator, dtype=torch.float64)


def _energy(outputs: Tensor) -> float:
    """Mean squared norm of rows, summed in float64."""
    return float(in_float64(outputs).square().sum()) / len(outputs)
