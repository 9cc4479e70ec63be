"""The folder of a healing: its curve beside the weights, a remark in the report and the card."""

from pathlib import Path
from typing import Any

from torch import Tensor

from slimrank.checkpoint import HEALING, FolderContents, read_healing, state_folder, write_derived
from slimrank.checkpoint.heal_state import removed_what_is_left
from slimrank.recipe import HealRecipe
from slimrank.report import CompressionReport, HealReport

REMARK = (
    "Afterwards {what} were trained end to end towards the predictions of the dense model "
    "(slimrank heal); heal.json has the curve. The losses above are those of the factors before."
)
NOTHING = "slimrank heal was tried and brought nothing on held-out text: weights are as before it."


def write_healed(
    model: Any,
    contents: FolderContents,
    out: Path,
    report: HealReport,
    probe: Tensor,
    passing: Path | None,
) -> HealReport:
    """Write, read back, rename.

    Parameters
    ----------
    model : PreTrainedModel
        Healed.
    contents : FolderContents
        Of the folder that it came from.
    out : Path
    report : HealReport
    probe : Tensor of shape (1, tokens)
    passing : Path or None
        As for `slimrank.checkpoint.write_derived`.

    Raises
    ------
    CheckpointError
        If the disk is full, or what is read back is not what was written.
    """

    def entry(weight_bytes: int) -> HealReport:
        return report.model_copy(update={"weight_bytes": weight_bytes})

    return write_derived(model, contents, out, HEALING, entry, _after_healing, probe, passing)


def finished(folder: Path, out: Path, recipe: HealRecipe) -> HealReport | None:
    """Report of a run that was cut off when only the removal of its state was left to do.

    Parameters
    ----------
    folder, out : Path
    recipe : HealRecipe
    """
    if not state_folder(out).is_dir():
        return None
    report = read_healing(out)
    if report is None or (report.source, report.recipe) != (str(folder), recipe):
        return None
    return report if removed_what_is_left(out, recipe.fingerprint()) else None


def _after_healing(report: CompressionReport, healed: HealReport) -> CompressionReport:
    """The report of the compression, whose losses are from before, with a remark."""
    rank = healed.recipe.lora_rank
    what = "factors and norms" if rank is None else f"the factors, by adapters of rank {rank},"
    remark = REMARK.format(what=what) if healed.kept_step else NOTHING
    size = report.size.model_copy(update={"weight_bytes": healed.weight_bytes})
    return report.model_copy(update={"size": size, "warnings": (*report.warnings, remark)})
