"""Moments over the tokens of all processes."""

from dataclasses import replace

import torch
from torch import Tensor

from slimrank import processes
from slimrank.calibration.windows import TokenWindows
from slimrank.errors import TextError
from slimrank.linalg import Moments


def joint_moments(own: Moments) -> Moments:
    """Merge the moments of all processes: means over their tokens, so exact beyond rounding.

    Parameters
    ----------
    own : Moments
        Over the tokens of this process; its tensors are written to. Of one linear in all processes,
        without what is known of gradients.

    Examples
    --------
    >>> joint_moments(Moments(torch.eye(1), tokens=3)).tokens
    3
    """
    if processes.count() == 1:
        return own
    tokens = processes.sums(own.tokens)[0]
    share = own.tokens / max(tokens, 1)
    known = own.arriving
    assert known is not None
    drift = own.drift
    if processes.largest([float(drift is not None)])[0] and drift is None:
        drift = torch.zeros_like(known)
    original, shifted, drift = (
        _added(moment, share) for moment in (own.original, own.shifted, drift)
    )
    return replace(own, original=original, shifted=shifted, drift=drift, tokens=round(tokens))


def _added(moment: Tensor | None, share: float) -> Tensor | None:
    return None if moment is None else processes.add_up(moment.mul_(share))


def own_windows(windows: TokenWindows) -> TokenWindows:
    """Windows of this process: of N processes each has one in N.

    Raises
    ------
    TextError
        If there are fewer windows than processes.
    """
    if len(windows.windows) < processes.count():
        raise TextError(
            f"{processes.count()} processes cannot share {len(windows.windows)} sequences; start "
            "fewer, or calibrate on more"
        )
    return TokenWindows(tuple(processes.share(windows.windows)))
