"""A compressed folder becomes one whose factors are in eight bits."""

import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from slimrank.checkpoint import (
    CARD,
    QUANTIZATION,
    REPORT,
    SHARD_SIZE,
    FolderContents,
    compare_with_folder,
    load,
    mark_compressed,
    model_card,
    read_folder,
    renamed_when_done,
    require_writable,
    weight_file_bytes,
)
from slimrank.errors import CheckpointError, RecipeError
from slimrank.evaluation import perplexity
from slimrank.linalg import rounding_loss
from slimrank.model import block_path, list_sites, replace_linear
from slimrank.nn import Int8Linear, LowRankLinear, round_factors
from slimrank.report import CompressionReport, QuantizationReport, QuantizedLinear
from slimrank.source import require_finite_weights
from slimrank.targets import num_embeddings

BITS = 8
PROBE_TOKENS = 12
REMARK = (
    "Afterwards the factors were rounded to 8 bits, with one scale for each row; quantize.json has "
    "what it cost. The losses above are those of the factors before."
)


@torch.no_grad()
def quantize(
    folder: str | Path,
    out: str | Path,
    *,
    bits: int = BITS,
    dense_linears: bool = False,
    text: Int[Tensor, " tokens"] | None = None,
    sequence_length: int = 2048,
) -> QuantizationReport:
    """Round the factors of a compressed folder to int8 codes with one scale for each row.

    Weights only: activations, biases, norms, embeddings and the head stay what they are. The new
    folder is written under a passing name, loaded again and compared before it gets its own name.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank.
    out : str or Path
        Must not exist.
    bits : int
        8; others are refused.
    dense_linears : bool
        Round the linears of the blocks that stayed dense too, routers left out.
    text : Tensor of shape (tokens,), optional
        Token ids on which the perplexity is taken before and after.
    sequence_length : int
        Of the windows of this text.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    RecipeError
        If `bits` is not 8, or nothing is there to be rounded.
    CheckpointError
        If `folder` is none of ours, damaged, or quantised already; if `out` exists, the disk is
        full, or what is read back is not what was written. Nothing remains then.
    NumericalError
        If a weight is not finite.
    """
    folder, out = Path(folder), Path(out)
    if bits != BITS:
        raise RecipeError(f"bits is {bits}; only {BITS} is supported")
    contents = read_folder(folder)
    if contents.int8:
        raise CheckpointError(f"{folder} is in {BITS} bits already; start from what it came from")
    require_writable(out)
    model = load(folder, dtype="auto")
    require_finite_weights(model, str(folder))
    attentions = {
        name: (entry.keys, entry.values)
        for name, entry in model.config.quantization_config.kv_cache.items()
    }
    before = None if text is None else perplexity(model, text, sequence_length)
    linears = _round(model, contents, dense_linears)
    mark_compressed(model, attentions)
    after = None if text is None else perplexity(model, text, sequence_length)
    report = QuantizationReport(
        source=str(folder),
        bits=BITS,
        linears=tuple(linears),
        weight_bytes_before=weight_file_bytes(folder),
        weight_bytes=0,
        perplexity_before=None if before is None else before.value,
        perplexity=None if after is None else after.value,
        perplexity_tokens=0 if after is None else after.tokens,
    )
    return _write(model, contents, report, out)


def _round(model: Any, contents: FolderContents, dense_linears: bool) -> list[QuantizedLinear]:
    """Put the linears into eight bits, in place."""
    factorised = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    dense = _dense(model, contents, factorised) if dense_linears else {}
    if not factorised and not dense:
        raise RecipeError(f"{contents.folder} has no factors to round, only dense linears")
    losses = _truncation_losses(contents)
    linears = []
    for name, layer in factorised.items():
        exact, before = layer.factors(), _bytes(layer.latent.weight, layer.expand.weight)
        round_factors(layer)
        linears.append(
            QuantizedLinear(
                name=name,
                rank=layer.rank,
                bytes_before=before,
                bytes_after=_bytes(*layer.latent.buffers(), *layer.expand.buffers()),
                rounding_loss=rounding_loss(exact, layer.factors()),
                truncation_loss=losses.get(name),
            )
        )
    for name, linear in dense.items():
        rounded = Int8Linear.from_linear(linear)
        replace_linear(model, name, rounded)
        linears.append(
            QuantizedLinear(
                name=name,
                rank=None,
                bytes_before=_bytes(linear.weight),
                bytes_after=_bytes(rounded.codes, rounded.scale),
                rounding_loss=_dense_loss(linear.weight, rounded.matrix()),
                truncation_loss=None,
            )
        )
    return linears


def _dense(
    model: Any, contents: FolderContents, factorised: dict[str, LowRankLinear]
) -> dict[str, nn.Linear]:
    """Linears of the blocks that are no factors, by name."""
    factors = {f"{name}.{part}" for name in factorised for part in ("latent", "expand")}
    path = block_path(model, contents.report.recipe.blocks if contents.report else None)
    names = [site.name for site in list_sites(model, path) if site.name not in factors]
    found = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


def _truncation_losses(contents: FolderContents) -> dict[str, float]:
    report = contents.report if contents.report_fits else None
    return {linear.name: linear.measured_loss for linear in report.linears} if report else {}


def _write(
    model: Any, contents: FolderContents, report: QuantizationReport, out: Path
) -> QuantizationReport:
    """Write, read back, rename."""
    source = Path(contents.folder)
    with renamed_when_done(out) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        written = report.model_copy(update={"weight_bytes": weight_file_bytes(folder)})
        (folder / QUANTIZATION).write_text(written.model_dump_json(indent=1), encoding="utf-8")
        if contents.report is not None and contents.report_fits:
            compression = _after_rounding(contents.report, written)
            (folder / REPORT).write_text(compression.model_dump_json(indent=1), encoding="utf-8")
            (folder / CARD).write_text(model_card(compression, out.name), encoding="utf-8")
        for file in source.iterdir():
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            if file.is_file() and not weights and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        probe = torch.arange(PROBE_TOKENS)[None] % num_embeddings(model)
        compare_with_folder(model, folder, probe)
        if read_folder(folder).quantization != written:
            raise CheckpointError(f"{QUANTIZATION} does not read back as it was written")
    return written


def _after_rounding(report: CompressionReport, rounded: QuantizationReport) -> CompressionReport:
    """The report of the compression with the bytes that are there now, and a remark."""
    size = report.size.model_copy(update={"weight_bytes": rounded.weight_bytes})
    return report.model_copy(update={"size": size, "warnings": (*report.warnings, REMARK)})


def _dense_loss(exact: Tensor, rounded: Tensor) -> float:
    exact = exact.double()
    energy = max(float(exact.square().sum()), torch.finfo(torch.float64).tiny)
    return float((exact - rounded.double()).square().sum()) / energy


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
