"""A compressed folder becomes one whose factors are in eight bits."""

from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from slimrank.allocation import PIVOT_PARAMS
from slimrank.checkpoint import (
    QUANTIZATION,
    FolderContents,
    load,
    mark_compressed,
    read_folder,
    require_writable,
    weight_file_bytes,
    write_derived,
)
from slimrank.errors import CheckpointError, RecipeError
from slimrank.evaluation import perplexity
from slimrank.linalg import rounding_loss
from slimrank.model import block_path, list_sites, replace_linear
from slimrank.nn import Int8Linear, LowRankLinear, remap_factors, round_factors
from slimrank.report import (
    CompressionReport,
    LinearReport,
    Packing,
    QuantizationReport,
    QuantizedLinear,
)
from slimrank.source import require_finite_weights
from slimrank.targets import probe_ids

BITS = 8
HALVES = (torch.bfloat16, torch.float16)
ROUND = {"rows": round_factors, "remapped": remap_factors}
HOW = {
    "rows": "rounded to 8 bits, with one scale for each row",
    "remapped": "packed into the memory of one dense matrix, most of their rows in 8 bits; pivoted "
    "ones became plain first",
}
REMARK = (
    "Afterwards the factors were {how}; quantize.json has what it cost. The losses above are those "
    "of the factors before."
)


@torch.no_grad()
def quantize(
    folder: str | Path,
    out: str | Path,
    *,
    bits: int = BITS,
    packing: str = "rows",
    dense_linears: bool = False,
    text: Int[Tensor, " tokens"] | None = None,
    sequence_length: int = 2048,
) -> QuantizationReport:
    """Round the factors of a compressed folder to int8 codes.

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
    packing : {'rows', 'remapped'}
        How factors are stored: codes with one scale for each row, or AA-SVD's "q" rows: both
        factors in the memory of one dense matrix, what does not fit there in eight bits in 16
        (`slimrank.linalg.remap`). 'remapped' needs a model of 16 bits. Pivoted factors become plain
        for it, which changes no output beyond rounding.
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
        If `bits` is not 8, `packing` is unknown or needs another dtype, or nothing is there to be
        rounded.
    CheckpointError
        If `folder` is none of ours, damaged, or quantised already; if `out` exists, the disk is
        full, or what is read back is not what was written. Nothing remains then.
    NumericalError
        If a weight is not finite.
    """
    folder, out = Path(folder), Path(out)
    if bits != BITS:
        raise RecipeError(f"bits is {bits}; only {BITS} is supported")
    way = _known_packing(packing)
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
    linears = _round(model, contents, way, dense_linears)
    mark_compressed(model, attentions)
    after = None if text is None else perplexity(model, text, sequence_length)
    report = QuantizationReport(
        source=str(folder),
        bits=BITS,
        packing=way,
        linears=tuple(linears),
        weight_bytes_before=weight_file_bytes(folder),
        weight_bytes=0,
        perplexity_before=None if before is None else before.value,
        perplexity=None if after is None else after.value,
        perplexity_tokens=0 if after is None else after.tokens,
    )

    def entry(weight_bytes: int) -> QuantizationReport:
        return report.model_copy(update={"weight_bytes": weight_bytes})

    probe = probe_ids(model)
    return write_derived(model, contents, out, QUANTIZATION, entry, _after_rounding, probe)


def _known_packing(word: str) -> Packing:
    known: tuple[Packing, ...] = get_args(Packing)
    for packing in known:
        if packing == word:
            return packing
    raise RecipeError(f"packing is '{word}'; it is one of {', '.join(known)}")


def _round(
    model: Any, contents: FolderContents, packing: Packing, dense_linears: bool
) -> list[QuantizedLinear]:
    """Put the linears into eight bits, in place."""
    factorised = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    dense = _dense(model, contents, factorised) if dense_linears else {}
    if not factorised and not dense:
        raise RecipeError(f"{contents.folder} has no factors to round, only dense linears")
    if packing == "remapped":
        _require_halves(factorised)
    losses = _truncation_losses(contents)
    linears = []
    for name, layer in factorised.items():
        exact, before = layer.factors(), _bytes(layer.latent.weight, layer.expand.weight)
        ROUND[packing](layer)
        stored = [tensor for part in layer.children() for tensor in part.buffers()]
        linears.append(
            QuantizedLinear(
                name=name,
                rank=layer.rank,
                bytes_before=before,
                bytes_after=_bytes(*stored),
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


def _require_halves(factorised: dict[str, LowRankLinear]) -> None:
    for name, layer in factorised.items():
        dtype = layer.latent.weight.dtype
        if dtype not in HALVES:
            raise RecipeError(
                f"packing 'remapped' is for models of 16 bits; the factors of {name} are {dtype}: "
                "compress with dtype bfloat16 or float16, or take packing 'rows'"
            )


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


def _after_rounding(report: CompressionReport, rounded: QuantizationReport) -> CompressionReport:
    """The report of the compression with what is there now, and a remark."""
    linears, size = report.linears, report.size
    if rounded.packing == "remapped":
        linears = tuple(_made_plain(linear) for linear in linears)
    more = sum(x.params for x in linears) - sum(x.params for x in report.linears)
    params = {
        "target_params": size.target_params + more,
        "model_params": size.model_params + more,
        "weight_bytes": rounded.weight_bytes,
    }
    remark = REMARK.format(how=HOW[rounded.packing])
    changed = {
        "linears": linears,
        "size": size.model_copy(update=params),
        "warnings": (*report.warnings, remark),
    }
    return report.model_copy(update=changed)


def _made_plain(linear: LinearReport) -> LinearReport:
    if not linear.pivoted or linear.rank is None:
        return linear
    params = linear.params + linear.rank * (linear.rank - PIVOT_PARAMS)
    return linear.model_copy(update={"pivoted": False, "params": params})


def _dense_loss(exact: Tensor, rounded: Tensor) -> float:
    exact = exact.double()
    energy = max(float(exact.square().sum()), torch.finfo(torch.float64).tiny)
    return float((exact - rounded.double()).square().sum()) / energy


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
