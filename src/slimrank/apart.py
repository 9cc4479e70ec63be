"""The linears of a block, solved by several processes: each solves its share, all know all."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from slimrank import processes
from slimrank.environment import gathered_warnings
from slimrank.errors import NumericalWarning
from slimrank.model import LinearSite

T = TypeVar("T")
Packed = tuple[str, Mapping[str, Tensor]]


def made_apart(
    sites: Sequence[LinearSite],
    make: Callable[[LinearSite], T],
    pack: Callable[[T], Packed],
    unpack: Callable[[LinearSite, str, Mapping[str, Tensor]], T],
) -> dict[str, T]:
    """Make something of each linear, in one of the processes; hand it round to all others.

    Parameters
    ----------
    sites : sequence of LinearSite
        The same in all processes.
    make : callable
        Of one linear.
    pack, unpack : callable
        To one text and tensors by name, and back; what is made alone takes neither way.

    Returns
    -------
    dict of str to T
        By the linear's name, in order.

    Raises
    ------
    ProcessError
        If another process has ended, as by an error of its own.

    Warns
    -----
    NumericalWarning
        What was warned of in any process.
    """
    if processes.count() == 1:
        return {site.name: make(site) for site in sites}
    owners = share_work([_work(site) for site in sites], processes.count())
    own: dict[str, T] = {}
    told: dict[str, list[str]] = {}
    for site, owner in zip(sites, owners, strict=True):
        if owner == processes.number():
            with gathered_warnings() as messages:
                own[site.name] = make(site)
            told[site.name] = messages
    found: dict[str, T] = {}
    for site, owner in zip(sites, owners, strict=True):
        if owner == processes.number():
            text, tensors = pack(own[site.name])
            processes.hand_round(json.dumps([text, told[site.name]]), tensors, owner)
            found[site.name] = own.pop(site.name)
            continue
        both, tensors = processes.hand_round(source=owner)
        text, messages = json.loads(both)
        for message in messages:
            warnings.warn(message, NumericalWarning, stacklevel=2)
        found[site.name] = unpack(site, text, tensors)
    return found


def share_work(sizes: Sequence[int], count: int) -> list[int]:
    """Share pieces of work out: the largest first, each to who has least to do.

    Parameters
    ----------
    sizes : sequence of int
    count : int
        Of those who share.

    Returns
    -------
    list of int
        Who does each piece, from 0.

    Examples
    --------
    >>> share_work([4, 1, 1, 5, 3], 2)
    [1, 0, 0, 0, 1]
    """
    owners, loads = [0] * len(sizes), [0] * count
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += sizes[place]
    return owners


def _work(site: LinearSite) -> int:
    """What a solve takes, up to a factor that was measured to be about the same for all shapes.

    Tall weights take longest: a basis of their outputs is orthonormalised.
    """
    out, inside = site.shape.out_features, site.shape.in_features
    return out * inside * (out + min(out, inside))
