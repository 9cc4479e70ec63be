"""A compressed folder is copied with the modelling file by which it loads without slimrank."""

from pathlib import Path

import torch

from slimrank.checkpoint import (
    CARD,
    REMOTE_CODE,
    add_remote_code,
    compare_with_folder,
    copy_other_files,
    copy_weights,
    load,
    model_card,
    read_folder,
    renamed_when_done,
    require_served_by_code,
    require_writable,
    weight_file_bytes,
)
from slimrank.report import RemoteCodeReport
from slimrank.targets import probe_ids


@torch.no_grad()
def export_remote_code(folder: str | Path, out: str | Path) -> RemoteCodeReport:
    """Copy a compressed folder, and put the modelling file into the copy.

    The copy loads with ``trust_remote_code=True`` where slimrank is not installed, and elsewhere as
    before. It is written under a passing name, loaded again and compared before it gets its own.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank; factors may be in eight bits.
    out : str or Path
        Must not exist.

    Returns
    -------
    RemoteCodeReport

    Raises
    ------
    ModelError
        If the file cannot load the model: packed factors, projections that were taken apart for a
        cache of latents, a class that transformers lacks.
    CheckpointError
        If `folder` is none of ours or damaged; if `out` exists, the disk is full, or what is read
        back is not what was written. Nothing remains then.
    """
    source, out = Path(folder), Path(out)
    contents = read_folder(source)
    require_writable(out)
    model = load(source, dtype="auto")
    require_served_by_code(model)
    with renamed_when_done(out) as passing:
        copy_weights(source, passing)
        if contents.report is not None and contents.report_fits:
            card = model_card(contents.report, out.name, remote_code=True)
            (passing / CARD).write_text(card, encoding="utf-8")
        copy_other_files(source, passing, (REMOTE_CODE,))
        add_remote_code(model, passing)
        compare_with_folder(model, passing, probe_ids(model))
    return RemoteCodeReport(
        source=str(source),
        file=REMOTE_CODE,
        linears=len({*contents.ranks, *contents.int8}),
        weight_bytes=weight_file_bytes(out),
    )
