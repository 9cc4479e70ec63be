"""A compressed folder becomes an ordinary checkpoint of the same function."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.checkpoint import (
    SHARD_SIZE,
    compare_with_folder,
    copy_other_files,
    renamed_when_done,
    weight_file_bytes,
)
from slimrank.exporting.opening import LEFT_OUT, open_folder
from slimrank.model import replace_linear
from slimrank.nn import Int8Linear, LowRankLinear, SplitLinear, detach_latent_cache
from slimrank.report import ExportReport
from slimrank.targets import probe_ids

PROBE_TOKENS = 64


@torch.no_grad()
def export_dense(folder: str | Path, out: str | Path) -> ExportReport:
    """Multiply the factors of a compressed folder out, for tools that know only dense linears.

    The new folder needs no slimrank, and is as large as the model was before. It is written under a
    passing name, loaded again and compared before it gets its own name.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank; factors may be in eight bits.
    out : str or Path
        Must not exist.

    Returns
    -------
    ExportReport
        With how far logits are from those of the factors: products are in float64, and rounded
        once to the dtype of the model.

    Raises
    ------
    CheckpointError
        If `folder` is none of ours or damaged; if `out` exists, the disk is full, or what is read
        back is not what was written. Nothing remains then.
    NumericalError
        If a weight is not finite.
    """
    source, out = Path(folder), Path(out)
    model = open_folder(source, out)
    probe = probe_ids(model, PROBE_TOKENS)
    before = _logits(model, probe)
    linears = _multiply_out(model)
    apart = _logits(model, probe) - before
    with renamed_when_done(out) as passing:
        model.save_pretrained(passing, max_shard_size=SHARD_SIZE)
        copy_other_files(source, passing, LEFT_OUT)
        compare_with_folder(model, passing, probe)
        after = weight_file_bytes(passing)
    return ExportReport(
        source=str(source),
        linears=linears,
        weight_bytes_before=weight_file_bytes(source),
        weight_bytes=after,
        logits_apart=float(apart.abs().max() / before.abs().max()),
    )


def _multiply_out(model: Any) -> int:
    """Put dense linears into the places of all of ours, in place; tell how many."""
    detach_latent_cache(model)
    count = 0
    for kinds in (SplitLinear, (LowRankLinear, Int8Linear)):  # the parts of a split one with it
        for name, module in list(model.named_modules()):
            if isinstance(module, kinds):
                replace_linear(model, name, module.to_linear())
                count += 1
    model.hf_quantizer.remove_quantization_config(model)
    return count


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
