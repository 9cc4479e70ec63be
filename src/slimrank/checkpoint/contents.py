"""What a compressed folder holds, read from its configuration and the headers of its files."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slimrank.allocation import PIVOT_PARAMS
from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig
from slimrank.checkpoint.folder import REPORT, read_healing, read_quantization, read_report
from slimrank.checkpoint.size import read_headers, safetensors_bytes, weight_file_bytes
from slimrank.checkpoint.sound import own_weight_files, read_config
from slimrank.errors import CheckpointError
from slimrank.report import CompressionReport, HealReport, QuantizationReport, SizeReport

MOST = 2**48  # numbers of one matrix
PACKED = ("packed", "latent_scale", "expand_scale")


class FolderContents(BaseModel):
    """A compressed folder.

    Parameters
    ----------
    folder : str
    size : SizeReport
        From the report if there is one that fits the files; else from the files, where the
        targeted linears are those that are factorised.
    ranks : dict of str to int
        Of the factorised linears.
    int8 : tuple of str
        Linears whose factors, or whose matrix, are in eight bits.
    quantization : QuantizationReport or None
        What the rounding cost; there if `int8` is.
    healing : HealReport or None
        How the factors were trained end to end, if they were.
    report : CompressionReport or None
        As written beside the weights: recipe, losses, fingerprints.
    report_fits : bool
        False if the weights are not, in ranks or bytes, what the report describes.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    size: SizeReport
    ranks: dict[str, int]
    int8: tuple[str, ...] = ()
    quantization: QuantizationReport | None = None
    healing: HealReport | None = None
    report: CompressionReport | None
    report_fits: bool


def read_folder(folder: str | Path) -> FolderContents:
    """Look into a compressed folder; no weight is read.

    Raises
    ------
    CheckpointError
        If it is no compressed folder, or a damaged one.
    """
    folder = Path(folder)
    config = _read_config(folder)
    files = own_weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    ranks = {name: linear.rank for name, linear in config.linears.items()}
    tensors = _unpacked(read_headers(files), config)
    size = _size(tensors, weight_file_bytes(folder), folder)
    report = read_report(folder) if (folder / REPORT).is_file() else None
    fits = report is not None and (
        report.size.weight_bytes == size.weight_bytes
        and {x.name: x.rank for x in report.linears if x.rank is not None} == ranks
    )
    return FolderContents(
        folder=str(folder),
        size=report.size if report is not None and fits else size,
        ranks=ranks,
        int8=tuple(config.int8_linears),
        quantization=read_quantization(folder) if config.int8_linears else None,
        healing=read_healing(folder),
        report=report,
        report_fits=fits,
    )


def _read_config(folder: Path) -> LowRankConfig:
    entry = read_config(folder).get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not compressed by slimrank")
    return LowRankConfig(**entry)


def _size(tensors: dict[str, Tensor], weight_bytes: int, folder: Path) -> SizeReport:
    """Budget line from the files alone."""
    tensors = _as_floats(tensors)
    dense = dict(tensors)
    before = after = scales = pivot_params = 0
    for name, latent in tensors.items():
        if not name.endswith(".latent.weight"):
            continue
        base = name.removesuffix(".latent.weight")
        expand = dense.pop(f"{base}.expand.weight", None)
        if expand is None:
            raise CheckpointError(f"{folder} lacks {base}.expand.weight")
        del dense[name]
        pivots = dense.pop(f"{base}.pivots", None)
        rows = 0 if pivots is None else pivots.numel()
        if latent.ndim != 2 or expand.ndim != 2 or latent.shape[0] != expand.shape[1]:
            raise CheckpointError(f"{folder}: the factors of {base} do not fit each other")
        out_features, in_features = expand.shape[0] + rows, latent.shape[1]
        dense[f"{base}.weight"] = _matrix(latent, out_features, in_features, base)
        before += out_features * in_features
        after += latent.numel() + expand.numel() + PIVOT_PARAMS * rows
        pivot_params += (PIVOT_PARAMS - 1) * rows
        scales += out_features * in_features * (latent.element_size() - 1) - 2 * out_features
    dense_bytes = safetensors_bytes(dense)
    return SizeReport(
        target_params_before=max(before, 1),
        target_params=after,
        model_params_before=max(sum(t.numel() for t in dense.values()), 1),
        model_params=sum(t.numel() for t in tensors.values()) + pivot_params,
        weight_bytes_before=dense_bytes,
        weight_bytes=weight_bytes,
        int8_bytes=dense_bytes - scales,
    )


def _unpacked(tensors: dict[str, Tensor], config: LowRankConfig) -> dict[str, Tensor]:
    """Put the factors, of the dtype of their scales, in the place of packed ones.

    Raises
    ------
    CheckpointError
        If what is packed is not what the configuration says.
    """
    tensors = dict(tensors)
    for name, linear in config.linears.items():
        if linear.remapped is None:
            continue
        keys = [f"{name}.remapped.{part}" for part in PACKED]
        for key in keys:
            if key not in tensors:
                raise CheckpointError(f"the weight files lack {key}")
        packed, scale, _ = (tensors.pop(key) for key in keys)
        rank, sides = linear.rank, (linear.remapped.out_features, linear.remapped.in_features)
        if packed.shape != (max(sides), rank):
            raise CheckpointError(
                f"{name}.remapped.packed has shape {tuple(packed.shape)}, "
                f"config.json says {(max(sides), rank)}"
            )
        tensors[f"{name}.latent.weight"] = _matrix(scale, rank, sides[1], name)
        tensors[f"{name}.expand.weight"] = _matrix(scale, sides[0], rank, name)
    return tensors


def _matrix(like: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A matrix on the meta device, of a size that could be."""
    if rows * columns > MOST:
        raise CheckpointError(f"{name} would be {rows} by {columns}; it is no linear")
    return like.new_empty(rows, columns)


def _as_floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the matrix, of the dtype of its scales, in the place of codes and scales."""
    coded = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    coded = [name for name in coded if f"{name}.scale" in tensors]
    apart = {f"{name}.{part}" for name in coded for part in ("codes", "scale")}
    return {name: tensor for name, tensor in tensors.items() if name not in apart} | {
        f"{name}.weight": tensors[f"{name}.scale"].new_empty(tensors[f"{name}.codes"].shape)
        for name in coded
    }
