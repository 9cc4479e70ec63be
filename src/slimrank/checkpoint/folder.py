"""Write a folder under a passing name, read it back, and only then give it its own name."""

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from slimrank.checkpoint.aligned import align_folder
from slimrank.checkpoint.card import model_card
from slimrank.checkpoint.loading import load
from slimrank.checkpoint.mapped_folder import load_mapped, save_mapped
from slimrank.checkpoint.passing import renamed_when_done
from slimrank.checkpoint.remote_code import add_remote_code
from slimrank.checkpoint.size import SHARD_SIZE, weight_file_bytes
from slimrank.errors import CheckpointError, NumericalWarning
from slimrank.model import is_mapped, let_go_of
from slimrank.recipe import CompressionRecipe
from slimrank.report import CompressionReport, HealReport, QuantizationReport

RECIPE, REPORT, CARD = "recipe.yaml", "report.json", "README.md"
QUANTIZATION, HEALING = "quantize.json", "heal.json"

Entry = TypeVar("Entry", bound=BaseModel)


def write_folder(
    model: Any,
    tokenizer: Any,
    out: Path,
    report: CompressionReport,
    probe: Tensor,
    passing: Path | None = None,
    remote_code: bool = False,
) -> CompressionReport:
    """Write model, tokenizer, recipe, report and card; load them again and compare; rename.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Compressed, and marked so.
    tokenizer : transformers.PreTrainedTokenizerBase or None
    out : Path
        Must not exist.
    report : CompressionReport
        Written with the bytes that the weight files turn out to have.
    probe : Tensor of shape (1, tokens)
        Token ids on which the logits of both models are compared.
    passing : Path, optional
        Where the folder is until then, on the same disk; beside `out` if left out.
    remote_code : bool
        Put the modelling file beside, by which the folder loads without slimrank.

    Returns
    -------
    CompressionReport
        As written.

    Raises
    ------
    CheckpointError
        If the disk is full, or what is read back is not what was written. Nothing remains then.
    """
    with renamed_when_done(out, beside=passing) as folder:
        if is_mapped(model):
            save_mapped(model, folder)
        else:
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
            align_folder(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        size = report.size.model_copy(update={"weight_bytes": weight_file_bytes(folder)})
        finished = report.model_copy(update={"size": size})
        (folder / RECIPE).write_text(finished.recipe.to_yaml(), encoding="utf-8")
        (folder / REPORT).write_text(finished.model_dump_json(indent=1), encoding="utf-8")
        card = model_card(finished, out.name, remote_code)
        (folder / CARD).write_text(card, encoding="utf-8")
        if remote_code:
            add_remote_code(model, folder)
        _compare(model, folder, finished, probe)
    return finished


def read_report(folder: str | Path) -> CompressionReport:
    """Read the report of a compressed folder.

    Raises
    ------
    CheckpointError
        If the folder holds none, or a damaged one.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {REPORT}; it was not written by slimrank")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return CompressionReport.from_json(text, str(path))


def read_quantization(folder: str | Path) -> QuantizationReport | None:
    """Read what `slimrank quantize` wrote beside the weights; None if it is not there.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    return _read_entry(Path(folder) / QUANTIZATION, QuantizationReport)


def read_healing(folder: str | Path) -> HealReport | None:
    """Read what `slimrank heal` wrote beside the weights; None if it is not there.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    return _read_entry(Path(folder) / HEALING, HealReport)


def _read_entry(path: Path, kind: type[Entry]) -> Entry | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot read {path}: {line}") from error


def compare_with_folder(model: Any, folder: Path, probe: Tensor) -> None:
    """Load a folder again and hold it against the model that it was written from.

    Parameters
    ----------
    model : PreTrainedModel
    folder : Path
    probe : Tensor of shape (1, tokens)
        Token ids on which logits are compared.

    Raises
    ------
    CheckpointError
        If a tensor or a logit differs in one bit.
    """
    if is_mapped(model):
        again = load_mapped(folder, device=next(model.parameters()).device)
    else:
        again = load(folder, dtype="auto").to(next(model.parameters()).device)
    expected, found = (each.state_dict(keep_vars=True) for each in (model, again))
    if expected.keys() != found.keys():
        raise CheckpointError("the folder does not read back with the same tensors")
    for name, tensor in expected.items():
        written = found[name].to(tensor.device)
        same = tensor.dtype == written.dtype and torch.equal(tensor, written)
        if not same:
            raise CheckpointError(f"{name} does not read back as it was written")
        let_go_of((tensor, found[name]))
    _copy_passing_buffers(model, again)
    with torch.no_grad():
        probe = probe.to(next(model.parameters()).device)
        logits = [m(input_ids=probe, use_cache=False).logits for m in (model, again)]
    if not torch.equal(*logits):
        raise CheckpointError("the folder loads, but gives other logits than the model in memory")


def _compare(model: Any, folder: Path, report: CompressionReport, probe: Tensor) -> None:
    """Hold every file against what it was written from."""
    if CompressionRecipe.from_file(folder / RECIPE) != report.recipe:
        raise CheckpointError(f"{RECIPE} does not read back as it was written")
    if read_report(folder) != report:
        raise CheckpointError(f"{REPORT} does not read back as it was written")
    compare_with_folder(model, folder, probe)


def _copy_passing_buffers(model: Any, again: Any) -> None:
    """Give the copy those buffers that no checkpoint holds: only what is stored is compared.

    They differ where a user has cast the model: `.to(bfloat16)` also rounds the frequencies of
    rotary embeddings, which loading makes anew in float32.
    """
    stored = model.state_dict().keys()
    rounded = []
    for name, buffer in model.named_buffers():
        twin = again.get_buffer(name)
        if name not in stored and not (twin.dtype == buffer.dtype and torch.equal(twin, buffer)):
            rounded.append(name)
            parent, _, last = name.rpartition(".")
            setattr(again.get_submodule(parent), last, buffer)
    if rounded:
        warnings.warn(
            f"{rounded[0]} was changed after loading (cast?) and is not part of a checkpoint; the "
            "folder, loaded again, computes it anew and so differs a little from the model in "
            "memory",
            NumericalWarning,
            stacklevel=2,
        )
