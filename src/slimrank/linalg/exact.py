"""Double precision, on the device if it has it, else on the CPU."""

from functools import cache

import torch
from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: where it is, or on the CPU if its device (MPS) has no float64.

    Parameters
    ----------
    tensor : Tensor
        Of any dtype; given back as it is if it is float64 already.

    Examples
    --------
    >>> in_float64(torch.tensor([0.5], dtype=torch.bfloat16))
    tensor([0.5000], dtype=torch.float64)
    """
    return tensor.to(float64_device(tensor.device)).double()


def float64_device(device: torch.device | str) -> torch.device:
    """Where sums and solves of what is on a device are: there, or on the CPU.

    Parameters
    ----------
    device : torch.device or str

    Examples
    --------
    >>> float64_device("cpu")
    device(type='cpu')
    """
    device = torch.device(device)
    return device if _has_float64(device.type) else torch.device("cpu")


@cache
def _has_float64(kind: str) -> bool:
    if kind in ("cpu", "meta", "cuda"):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True
