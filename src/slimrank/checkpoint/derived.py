"""A folder that is made of a compressed one: what was done to it stands beside the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import Tensor

from slimrank.checkpoint.aligned import align_folder
from slimrank.checkpoint.card import model_card
from slimrank.checkpoint.contents import FolderContents, read_folder
from slimrank.checkpoint.folder import CARD, REPORT, compare_with_folder
from slimrank.checkpoint.other_files import copy_other_files
from slimrank.checkpoint.passing import renamed_when_done
from slimrank.checkpoint.remote_code import (
    REMOTE_CODE,
    add_remote_code,
    has_remote_code,
    why_not_by_code,
)
from slimrank.checkpoint.size import SHARD_SIZE, weight_file_bytes
from slimrank.errors import CheckpointError
from slimrank.report import CompressionReport

Entry = TypeVar("Entry", bound=BaseModel)


def write_derived(
    model: Any,
    source: FolderContents,
    out: Path,
    name: str,
    entry: Callable[[int], Entry],
    after: Callable[[CompressionReport, Entry], CompressionReport],
    probe: Tensor,
    passing: Path | None = None,
) -> Entry:
    """Write it under a passing name, read it back, rename it.

    A modelling file stays where it can load what is there.

    Parameters
    ----------
    model : PreTrainedModel
        What became of the source's, marked as compressed.
    source : FolderContents
        Its other files are copied.
    out : Path
        Must not exist.
    name : str
        Of the file of the entry.
    entry : callable
        From the bytes that the weight files turn out to have to what was done.
    after : callable
        From the source's report and the entry to the report of the new folder. A report that does
        not fit the source is copied as it is.
    probe : Tensor of shape (1, tokens)
        Token ids on which logits are compared.
    passing : Path, optional
        Where the folder is until then, on the same disk; beside `out` if left out.

    Returns
    -------
    Entry
        As written.

    Raises
    ------
    CheckpointError
        If the disk is full, or what is read back is not what was written. Nothing remains then.
    """
    has_code = has_remote_code(Path(source.folder)) and why_not_by_code(model) is None
    with renamed_when_done(out, beside=passing) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        align_folder(folder)
        written = entry(weight_file_bytes(folder))
        (folder / name).write_text(written.model_dump_json(indent=1), encoding="utf-8")
        report = None
        if source.report is not None and source.report_fits:
            report = after(source.report, written)
            (folder / REPORT).write_text(report.model_dump_json(indent=1), encoding="utf-8")
            card = model_card(report, out.name, has_code)
            (folder / CARD).write_text(card, encoding="utf-8")
        if has_code:
            add_remote_code(model, folder)
        copy_other_files(Path(source.folder), folder, (REMOTE_CODE,))
        compare_with_folder(model, folder, probe)
        found = read_folder(folder)
        if written not in (found.quantization, found.healing):
            raise CheckpointError(f"{name} does not read back as it was written")
        if report is not None and found.report != report:
            raise CheckpointError(f"{REPORT} does not read back as it was written")
    return written
