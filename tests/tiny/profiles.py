"""Profiles written down by hand: spectra and importances, and nothing was run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from slimrank.checkpoint import Profile, ProfiledLinear, ProfileManifest
from slimrank.checkpoint.profile import SPECTRA, write_manifest, write_tensors
from slimrank.recipe import CalibrationRecipe


def build(
    spectra: Mapping[str, Sequence[float]],
    importance: Sequence[float],
    after_norm: float | None = None,
    out_features: int | None = None,
    tokens: int = 1000,
) -> Profile:
    """Make a profile from singular values by name, ``<block>.<name within the block>``.

    Linears are square, as many inputs as singular values, unless `out_features` says more.
    """
    linears = tuple(
        ProfiledLinear(
            name=f"model.layers.{name}",
            block=int(name.split(".")[0]),
            kind=re.sub(r"\d+", "*", name.split(".", 1)[1]),
            out_features=out_features or len(values),
            in_features=len(values),
            tokens=tokens,
            energy=float(sum(value**2 for value in values)),
            jitter=0.0,
            stored_rank=0,
            token_check=None,
            seconds=0.0,
        )
        for name, values in spectra.items()
    )
    manifest = ProfileManifest(
        model="by hand",
        model_fingerprint="0" * 64,
        method="swift-svd",
        dtype="float32",
        for_kv_cache=False,
        calibration=CalibrationRecipe(),
        calibration_fingerprint="1" * 64,
        held_out_fingerprint="",
        tokens=tokens,
        importance=tuple(importance),
        importance_after_norm=after_norm,
        linears=linears,
        files={},
        seconds={},
        peak_bytes=0,
        environment={},
        warnings=(),
    )
    singular_values = {
        f"model.layers.{name}": torch.tensor(values, dtype=torch.float64)
        for name, values in spectra.items()
    }
    measured = {name: values.new_zeros(0) for name, values in singular_values.items()}
    return Profile(Path("by-hand"), manifest, singular_values, measured)


def write(profile: Profile, folder: Path) -> Path:
    """Put a profile on disk, without bases."""
    folder.mkdir(parents=True)
    tensors = {f"{name}.singular_values": x for name, x in profile.spectra.items()}
    tensors |= {f"{name}.measured_losses": x for name, x in profile.measured.items()}
    files = write_tensors(folder, SPECTRA, tensors)
    write_manifest(folder, profile.manifest.model_copy(update={"files": files}))
    return folder


def flat(count: int, size: int = 4) -> list[float]:
    """`size` singular values of which `count` are one: the effective rank is `count`."""
    return [1.0] * count + [0.0] * (size - count)
