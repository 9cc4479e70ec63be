"""What an unfinished run is of."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from slimrank.checkpoint.durable import Frozen
from slimrank.errors import CheckpointError, NumericalWarning
from slimrank.report import RanksReport

FINGERPRINT = 64  # letters of a SHA-256


class RunManifest(Frozen):
    """What a run is of; a resumed one must be of the same.

    Parameters
    ----------
    recipe_fingerprint, model_fingerprint, calibration_fingerprint : str
        SHA-256 of the settings, of the dense parameters, and of the token ids.
    dtype : str
        Of the model.
    versions : dict of str to str
        Of packages, and device and threads. Where they differ a run can go on, but its bits may
        not be those of a run that was never cut off.
    ranks : dict of str to int or None, or None
        Of the targeted linears, where None leaves one dense; None until they are chosen.
    allocation : RanksReport or None
        None for uniform ranks.
    warnings : tuple of str
        Given while ranks were chosen.
    generated_fingerprint : str
        Of the token ids that the model wrote itself; empty if there are none, or not yet.
    profile_fingerprint : str
        Of the profile that factors are made from, if the user gave one.
    """

    format_version: Literal[1] = 1
    recipe_fingerprint: str
    model_fingerprint: str
    calibration_fingerprint: str
    dtype: str
    versions: dict[str, str]
    ranks: dict[str, int | None] | None
    allocation: RanksReport | None
    warnings: tuple[str, ...] = ()
    generated_fingerprint: str = ""
    profile_fingerprint: str = ""


def warn_of_differences(what: str, begun: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn of each version that is not as it was when a run was begun.

    Parameters
    ----------
    what : str
        The run is called.
    begun, now : mapping of str to str
        Versions by name.

    Warns
    -----
    NumericalWarning
        If there is one.
    """
    for difference in differences(begun, now):
        warnings.warn(
            f"the {what} was begun with another {difference}; its bits may differ from those of an "
            "unbroken run",
            NumericalWarning,
            stacklevel=2,
        )


def differences(begun: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say which versions are not as they were when a run was begun.

    Examples
    --------
    >>> differences({"torch": "2.13.0", "threads": "2"}, {"torch": "2.14.0", "threads": "2"})
    ['torch 2.13.0 -> 2.14.0']
    """
    return [
        f"{name} {begun.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in dict.fromkeys((*begun, *now))
        if begun.get(name) != now.get(name)
    ]


def require_same(folder: Path, what: str, begun: Mapping[str, str], now: Mapping[str, str]) -> None:
    """See that what is to go on is what was begun.

    Parameters
    ----------
    folder : Path
        Where the unfinished one is kept.
    what : str
        It is called.
    begun, now : mapping of str to str
        Fingerprints by what they are of; other values are shown.

    Raises
    ------
    CheckpointError
        With all that differs, in one line.
    """
    others = [
        name if len(begun.get(name, "")) == FINGERPRINT else f"{name} ({begun.get(name)}, not {x})"
        for name, x in now.items()
        if begun.get(name) != x
    ]
    if others:
        raise CheckpointError(
            f"the unfinished {what} in {folder} was begun with another {', '.join(others)}; "
            "give what it was begun with, or delete it"
        )
