"""A profile on disk: spectra, bases and importance of a model, from which every size is made."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimrank.allocation import Layout, LinearProfile, LinearShape
from slimrank.calibration import TokenWindows
from slimrank.checkpoint.durable import file_hash
from slimrank.errors import CheckpointError
from slimrank.linalg import Decomposition, in_float64
from slimrank.recipe import CalibrationRecipe
from slimrank.report import Count

MANIFEST, SPECTRA, HELD_OUT = "profile.json", "spectra.safetensors", "held_out.safetensors"
SEAL = "profile.json.sha256"
Side = Annotated[int, Field(ge=1, le=2**31)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProfiledLinear(_Frozen):
    """One linear of a profile.

    Parameters
    ----------
    name : str
    block : int
    kind : str
        Module type: its name within the block, numbers as ``*``.
    out_features, in_features : int
    tokens : int
        Calibration tokens that reached it.
    energy : float
        Mean squared norm of its outputs per token, bias left out.
    jitter : float
    stored_rank : int
        Columns of the basis on disk; 0 if spectra only.
    token_check : float or None
        See `slimrank.report.LinearReport`.
    seconds : float
        Of the solve.
    mean_square_gradient : float or None
        Of the loss at its outputs, per token and output, if gradients were taken.
    """

    name: str
    block: Count
    kind: str
    out_features: Side
    in_features: Side
    tokens: Count
    energy: float
    jitter: float
    stored_rank: Count
    token_check: float | None
    seconds: float
    mean_square_gradient: float | None = None


class ProfileManifest(_Frozen):
    """What a profile is of, and what it holds.

    Parameters
    ----------
    model : str
    model_fingerprint : str
        SHA-256 over names, dtypes and values of all parameters.
    ridge : float
        Share of the mean diagonal that was added to the moments.
    method, dtype : str
    settings : dict of str to float or str
        Of the method, and which gradients it looked at.
    for_kv_cache : bool
        Whether it holds what a key/value cache of latents may ask for: the whole bases of keys and
        values, and fused projections split into keys, values and the rest.
    calibration : CalibrationRecipe
    calibration_fingerprint, held_out_fingerprint : str
        Of the token ids calibrated on, and of those kept to choose by.
    tokens : int
    importance : tuple of float
        Block influence of each block.
    importance_after_norm : float or None
        Of the last block, with the final norm counted in: the authors' variant.
    linears : tuple of ProfiledLinear
        In call order.
    files : dict of str to str
        SHA-256 of each file.
    seconds, peak_bytes, environment, warnings
        As in `slimrank.report.CompressionReport`.
    """

    format_version: Literal[1] = 1
    model: str
    model_fingerprint: str
    method: str
    ridge: float = 0.0
    settings: dict[str, float | str] = {}
    dtype: str
    for_kv_cache: bool
    calibration: CalibrationRecipe
    calibration_fingerprint: str
    held_out_fingerprint: str
    tokens: int
    importance: tuple[float, ...]
    importance_after_norm: float | None
    linears: tuple[ProfiledLinear, ...]
    files: dict[str, str]
    seconds: dict[str, float]
    peak_bytes: int
    environment: dict[str, str]
    warnings: tuple[str, ...]

    @model_validator(mode="after")
    def _blocks_are_known(self) -> "ProfileManifest":
        for linear in self.linears:
            if linear.block >= len(self.importance):
                raise ValueError(f"{linear.name} is of block {linear.block}, which has no entry")
        if len({linear.name for linear in self.linears}) < len(self.linears):
            raise ValueError("a linear is named twice")
        return self


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile folder, open.

    Parameters
    ----------
    folder : Path
    manifest : ProfileManifest
    spectra, measured : dict of str to Tensor
        By linear: all singular values; and the loss at each stored rank, taken from the moment.
    changes : dict of str to Tensor
        By linear: what each component is predicted to change the loss by if it goes, in nats a
        token (see `slimrank.linalg.predicted_changes`); empty unless made for allocation
        'threshold'.
    """

    folder: Path
    manifest: ProfileManifest
    spectra: dict[str, Tensor]
    measured: dict[str, Tensor]
    changes: dict[str, Tensor] = field(default_factory=dict)
    _open: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, ProfiledLinear]:
        """Entries of the manifest by name."""
        return {linear.name: linear for linear in self.manifest.linears}

    def allocation_profiles(
        self, layout: Layout = "plain", after_norm: bool = False
    ) -> list[LinearProfile]:
        """What an allocator may see of the linears.

        Parameters
        ----------
        layout : {'plain', 'pivoted', 'auto'}
            That the factors are to have.
        after_norm : bool
            Take the last block's importance after the final norm, as the authors' code does.

        Raises
        ------
        CheckpointError
            If that importance was not taken, because the norm is followed by a projection.
        """
        importance = list(self.manifest.importance)
        if after_norm:
            if self.manifest.importance_after_norm is None:
                raise CheckpointError(
                    f"{self.folder} has no importance after the final norm: the model changes the "
                    "width there"
                )
            importance[-1] = self.manifest.importance_after_norm
        return [
            LinearProfile(
                shape=LinearShape(x.name, x.out_features, x.in_features, layout),
                kind=x.kind,
                block=x.block,
                singular_values=self.spectra[x.name],
                tokens=x.tokens,
                importance=importance[x.block],
            )
            for x in self.manifest.linears
        ]

    def decomposition(self, name: str, weight: Tensor, rank: int) -> Decomposition:
        """Put a linear's weight to its basis again.

        Parameters
        ----------
        name : str
        weight : Tensor of shape (out, in)
        rank : int
            The largest that will be asked for.

        Raises
        ------
        CheckpointError
            If the profile holds spectra only or fewer columns, or its file is damaged.
        """
        entry = self.linears[name]
        if entry.block not in self._open:
            self._open.clear()
            self._open[entry.block] = self._read_block(entry.block)
        basis = self._open[entry.block].get(f"{name}.basis")
        dual = self._open[entry.block].get(f"{name}.dual")
        shape = (entry.out_features, entry.stored_rank)
        if basis is None or any(
            tuple(x.shape) != shape or not x.is_floating_point()
            for x in (basis, *([] if dual is None else [dual]))
        ):
            raise CheckpointError(f"{self.folder} holds no basis of {name}; profile anew")
        if tuple(weight.shape) != (entry.out_features, entry.in_features):
            raise CheckpointError(f"{self.folder} is of another model: {name} has other sides")
        if rank > entry.stored_rank:
            raise CheckpointError(
                f"{self.folder} keeps {name} up to rank {entry.stored_rank}, and {rank} is asked "
                "for; for a key/value cache of latents, profile with --kv"
            )
        return Decomposition(
            basis=basis,
            dual=dual,
            target=in_float64(weight.detach()),
            singular_values=self.spectra[name],
            jitter=entry.jitter,
        )

    def held_out(self) -> TokenWindows | None:
        """Windows of the calibration text that were not calibrated on; None if there are none."""
        if HELD_OUT not in self.manifest.files:
            return None
        tensors = _read(self.folder, HELD_OUT, self.manifest)
        names = [str(number) for number in range(len(tensors))]
        if tensors.keys() != set(names) or any(
            t.ndim != 1 or t.dtype != torch.int64 for t in tensors.values()
        ):
            raise CheckpointError(f"{self.folder / HELD_OUT} holds no windows; profile anew")
        return TokenWindows(tuple(tensors[name] for name in names))

    def _read_block(self, block: int) -> dict[str, Tensor]:
        name = block_file(block)
        if name not in self.manifest.files:
            raise CheckpointError(
                f"{self.folder} holds spectra only: enough to plan and to analyse, not to compress"
            )
        return _read(self.folder, name, self.manifest)


def block_file(block: int) -> str:
    """Name of the file with the bases of a block."""
    return f"block-{block:05d}.safetensors"


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write one file of a profile, read it back, and give its SHA-256 by its name.

    Raises
    ------
    CheckpointError
        If it does not read back as it was written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / name)
    again = load_file(folder / name)
    if any(not torch.equal(tensor, again[key]) for key, tensor in tensors.items()):
        raise CheckpointError(f"{name} does not read back as it was written")
    return {name: file_hash(folder / name)}


def write_manifest(folder: Path, manifest: ProfileManifest) -> None:
    """Write the manifest and its hash, last of all files, and read it back.

    Raises
    ------
    CheckpointError
        If it does not read back as it was written.
    """
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    (folder / SEAL).write_text(_seal(folder), encoding="utf-8")
    if read_profile(folder).manifest != manifest:
        raise CheckpointError(f"{MANIFEST} does not read back as it was written")


def read_profile(folder: str | Path) -> Profile:
    """Open a profile; bases are read when they are asked for.

    Raises
    ------
    CheckpointError
        If the folder is no profile, is of a newer version, or is damaged.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {MANIFEST}; it is no profile")
    try:
        if (folder / SEAL).read_bytes() != _seal(folder).encode():
            raise CheckpointError(f"{path} is damaged: it is not what was written; profile anew")
        manifest = ProfileManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise CheckpointError(f"{path} {_what_is_wrong(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    tensors = _read(folder, SPECTRA, manifest)
    spectra, measured = (
        {x.name: _named(tensors, f"{x.name}.{what}", folder) for x in manifest.linears}
        for what in ("singular_values", "measured_losses")
    )
    for x in manifest.linears:
        values, losses = spectra[x.name], measured[x.name]
        if len(values) != min(x.out_features, x.in_features) or len(losses) > len(values) + 1:
            raise CheckpointError(f"{folder / SPECTRA}: {x.name} has a spectrum of another linear")
    names = (x.name for x in manifest.linears)
    changes = {n: tensors[f"{n}.changes"] for n in names if f"{n}.changes" in tensors}
    return Profile(folder, manifest, spectra, measured, changes)


def require_space(folder: Path, size: int) -> None:
    """See that the disk has room, before any work.

    Raises
    ------
    CheckpointError
    """
    free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
    if free < size:
        raise CheckpointError(
            f"the profile takes {size / 1e9:.2f} GB and the disk of {folder} has "
            f"{free / 1e9:.2f} GB left; make room, or keep the spectra only"
        )


def _what_is_wrong(error: ValidationError) -> str:
    """First fault of a manifest, in one line."""
    first = error.errors()[0]
    if first["loc"] == ("format_version",):
        return (
            f"has format version {first['input']}; this slimrank reads version 1: upgrade slimrank"
        )
    return ": ".join(["is no profile", *(str(part) for part in first["loc"]), first["msg"]])


def _seal(folder: Path) -> str:
    """Hash of the manifest, in the format of ``sha256sum``."""
    return f"{file_hash(folder / MANIFEST)}  {MANIFEST}\n"


def _named(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{folder / SPECTRA} lacks {name}")
    if tensors[name].ndim != 1 or tensors[name].dtype != torch.float64:
        raise CheckpointError(f"{folder / SPECTRA}: {name} is no list of numbers")
    return tensors[name]


def _read(folder: Path, name: str, manifest: ProfileManifest) -> dict[str, Tensor]:
    """Read one file, after a look at its hash."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {name}; profile anew")
    try:
        if file_hash(path) != manifest.files.get(name):
            raise CheckpointError(f"{path} is damaged: it is not what was written; profile anew")
        tensors: dict[str, Any] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return tensors
