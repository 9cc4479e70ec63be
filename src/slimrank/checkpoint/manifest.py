"""What an unfinished run is of."""

from collections.abc import Mapping
from typing import Literal

from slimrank.checkpoint.durable import Frozen
from slimrank.report import RanksReport


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
    ranks : dict of str to int or None
        Of the targeted linears; None leaves one dense.
    allocation : RanksReport or None
        None for uniform ranks.
    """

    format_version: Literal[1] = 1
    recipe_fingerprint: str
    model_fingerprint: str
    calibration_fingerprint: str
    dtype: str
    versions: dict[str, str]
    ranks: dict[str, int | None]
    allocation: RanksReport | None

    def differences(self, versions: Mapping[str, str]) -> list[str]:
        """Say what is not as it was when the run was begun.

        Parameters
        ----------
        versions : mapping of str to str
            Of now, with the keys of the manifest's.

        Returns
        -------
        list of str
            Such as ``'torch 2.13.0 -> 2.14.0'``.
        """
        begun = self.versions
        return [
            f"{name} {begun.get(name, 'none')} -> {versions.get(name, 'none')}"
            for name in dict.fromkeys((*begun, *versions))
            if begun.get(name) != versions.get(name)
        ]
