"""What a compressed folder holds, read from its configuration and the headers of its files."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig
from slimrank.checkpoint.folder import REPORT, read_report
from slimrank.checkpoint.size import read_headers, safetensors_bytes, weight_file_bytes
from slimrank.errors import CheckpointError
from slimrank.report import CompressionReport, SizeReport


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
    report : CompressionReport or None
        As written beside the weights: recipe, losses, fingerprints.
    report_fits : bool
        False if the weights are not, in ranks or bytes, what the report describes.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    size: SizeReport
    ranks: dict[str, int]
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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors file")
    ranks = {name: linear.rank for name, linear in config.linears.items()}
    size = _size(read_headers(files), weight_file_bytes(folder), folder)
    report = read_report(folder) if (folder / REPORT).is_file() else None
    fits = report is not None and (
        report.size.weight_bytes == size.weight_bytes
        and {x.name: x.rank for x in report.linears if x.rank is not None} == ranks
    )
    return FolderContents(
        folder=str(folder),
        size=report.size if report is not None and fits else size,
        ranks=ranks,
        report=report,
        report_fits=fits,
    )


def _read_config(folder: Path) -> LowRankConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json; it is no model folder")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    entry = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not compressed by slimrank")
    return LowRankConfig(**entry)


def _size(tensors: dict[str, Tensor], weight_bytes: int, folder: Path) -> SizeReport:
    """Budget line from the files alone."""
    dense = dict(tensors)
    before = after = scales = 0
    for name, latent in tensors.items():
        if not name.endswith(".latent.weight"):
            continue
        base = name.removesuffix(".latent.weight")
        expand = dense.pop(f"{base}.expand.weight", None)
        if expand is None:
            raise CheckpointError(f"{folder} lacks {base}.expand.weight")
        del dense[name]
        out_features, in_features = expand.shape[0], latent.shape[1]
        dense[f"{base}.weight"] = latent.new_empty(out_features, in_features)
        before += out_features * in_features
        after += latent.numel() + expand.numel()
        scales += out_features * in_features * (latent.element_size() - 1) - 2 * out_features
    dense_bytes = safetensors_bytes(dense)
    return SizeReport(
        target_params_before=max(before, 1),
        target_params=after,
        model_params_before=sum(t.numel() for t in dense.values()),
        model_params=sum(t.numel() for t in tensors.values()),
        weight_bytes_before=dense_bytes,
        weight_bytes=weight_bytes,
        int8_bytes=dense_bytes - scales,
    )
