"""``slimrank compress``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from slimrank.checkpoint import UNFINISHED_RUN
from slimrank.cli import options as opt
from slimrank.cli.output import (
    friendly,
    print_json,
    print_size,
    print_table,
    role,
    say_if_it_begins,
    says_what_is_kept,
    span,
    track,
)
from slimrank.compression import compress
from slimrank.options import CompressionOptions
from slimrank.report import (
    CompressionReport,
    GlobalRanksReport,
    LinearReport,
    RefinementReport,
    ThresholdReport,
)

GO_ON = "finished blocks are kept; go on: slimrank compress … --resume"


@partial(friendly, is_shared=True)
def compress_command(
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    keep: opt.Keep = None,
    effort: opt.Effort = None,
    method: opt.MethodName = None,
    scope: opt.Scope = None,
    multiple_of: opt.MultipleOf = None,
    allocation: opt.Allocation = None,
    importance_weight: opt.ImportanceWeight = None,
    retained_share: opt.RetainedShare = None,
    importance_after_norm: opt.ImportanceAfterNorm = None,
    unit: opt.Unit = None,
    layout: opt.Layout = None,
    passes: opt.Passes = None,
    generate: opt.Generate = None,
    within_block: opt.WithinBlock = None,
    order: opt.Order = None,
    anchor: opt.Anchor = None,
    ridge: opt.Ridge = None,
    refine: opt.Refine = None,
    tune: opt.Tune = None,
    kv_keep: opt.KVKeep = None,
    profile: opt.ProfileFolder = None,
    calibration: opt.Calibration = None,
    num_sequences: opt.NumSequences = None,
    sequence_length: opt.SequenceLength = None,
    held_out_sequences: opt.HeldOutSequences = None,
    seed: opt.Seed = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    stream: opt.Stream = False,
    remote_code: opt.RemoteCode = False,
    resume: opt.Resume = False,
    recipe: opt.Recipe = None,
    json: opt.Json = False,
) -> None:
    """Compress MODEL and write it to OUT, checked."""
    wanted = opt.build_recipe(
        recipe,
        budget__param_ratio=keep,
        budget__scope=scope,
        budget__multiple_of=multiple_of,
        effort=effort,
        method=method,
        allocation=allocation,
        swift__importance_weight=importance_weight,
        swift__retained_share=retained_share,
        swift__importance_after_norm=importance_after_norm,
        global_ranks__unit=unit,
        layout=layout,
        passes=passes,
        generated_sequences=generate,
        within_block=within_block,
        order=order,
        anchor=anchor,
        ridge=ridge,
        refine__preset=refine,
        tune__epochs=tune,
        kv_cache__keep=kv_keep,
        calibration__source=calibration,
        calibration__num_sequences=num_sequences,
        calibration__sequence_length=sequence_length,
        calibration__held_out_sequences=held_out_sequences,
        calibration__seed=seed,
        targets=targets,
        ignore=ignore,
        dtype=dtype,
    )
    limit = None if memory is None else int(memory * 1e9)
    how = CompressionOptions(
        device=device,
        batch_size=batch_size,
        memory=limit,
        stream=stream,
        remote_code=remote_code,
        track=track,
    )
    say_if_it_begins(resume, UNFINISHED_RUN.is_kept(out) or out.exists())
    with says_what_is_kept(lambda: GO_ON if UNFINISHED_RUN.is_kept(out) else None):
        report = compress(model, wanted, out=out, profile=profile, options=how, resume=resume)
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    print_losses(report)
    print_allocation(report)
    print_blocks(report)
    if report.tuning:
        print_tuning(report.tuning)
    print_size(report.size)
    if report.kv_cache:
        typer.echo(report.kv_cache.line())
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    typer.echo(f"{seconds}; peak memory {report.peak_bytes / 1e9:.2f} GB")
    typer.echo(f"written to {out}, read back and compared")


def print_losses(report: CompressionReport) -> None:
    """Sum the linears up by role."""
    by_role: dict[str, list[LinearReport]] = {}
    for linear in report.linears:
        by_role.setdefault(role(linear.name), []).append(linear)
    rows = []
    for name, linears in by_role.items():
        low = [x for x in linears if x.rank is not None]
        rows.append(
            (
                name,
                len(linears),
                len(linears) - len(low),
                span([x.rank for x in low if x.rank is not None]) if low else "-",
                *(
                    _mean([getattr(x, loss) for x in low])
                    for loss in ("predicted_loss", "measured_loss", "stored_loss")
                ),
            )
        )
    what = "weight" if report.tokens == 0 else "output"
    print_table(
        f"{report.recipe.method}: mean relative {what} error (squared)"
        + (", before training" if report.is_trained else ""),
        ("linear", "count", "dense", "rank", "predicted", "measured", "as stored"),
        rows,
    )


def print_allocation(report: CompressionReport) -> None:
    """Say how dynamic ranks were chosen, if they were."""
    found = report.allocation
    if found is None:
        return
    dense = sum(linear.rank is None for linear in report.linears)
    if isinstance(found, ThresholdReport):
        typer.echo(
            f"ranks by threshold, {dense} of {len(report.linears)} linears left dense; predicted "
            f"change of the loss {found.predicted_change:.2g} nats a token, to first order, of a "
            f"rise by {found.rise:.2g} and a fall"
        )
        return
    if isinstance(found, GlobalRanksReport):
        what = " nats a token, to second order" if found.unit == "kfac" else ""
        typer.echo(
            f"ranks by unit {found.unit}, {dense} of {len(report.linears)} linears left dense; "
            f"predicted loss {found.predicted_loss:.4f}{what}"
        )
        return
    if found.trials:
        rows = [(f"{t.importance_weight:g}", f"{t.perplexity:.4f}") for t in found.trials]
        rows.append(("uniform", f"{found.uniform_perplexity:.4f}"))
        print_table(
            f"perplexity on {found.held_out_tokens} held-out tokens of the calibration text",
            ("importance weight", "perplexity"),
            rows,
        )
    typer.echo(
        f"ranks by importance weight {found.importance_weight:g}, "
        f"retained share {found.retained_share:g}"
    )


def print_blocks(report: CompressionReport) -> None:
    """Show how far the blocks' outputs are from the original ones, if that is known."""
    if not report.blocks:
        return
    rows = []
    for block in report.blocks:
        found = block.held_out or block.calibration
        before = block.unrefined_held_out or block.unrefined_calibration
        epochs = block.refinement.kept_epoch if block.refinement else "-"
        rows.append(
            (
                block.index,
                f"{before.relative_error:.4f}" if before else "-",
                f"{found.relative_error:.4f}",
                f"{found.cosine_distance:.4f}",
                epochs,
                f"{sum(block.seconds.values()):.1f}",
            )
        )
    text = "held-out" if report.blocks[0].held_out else "calibration"
    print_table(
        f"error of each block's output on {text} text",
        ("block", "unrefined", "error", "cosine distance", "epochs", "seconds"),
        rows,
    )


def print_tuning(found: RefinementReport) -> None:
    """Say what training all blocks together brought, on held-out text if there is any."""
    typer.echo(
        f"all blocks trained together for {found.kept_epoch} epochs: divergence of the predictions "
        f"on {found.course_text} text {found.course[0]:.4f} -> {found.kept_loss:.4f} nats a token"
    )


def _mean(losses: list[float | None]) -> str:
    """Mean of losses that are all known; a dash for those that a profile does not keep."""
    known = [loss for loss in losses if loss is not None]
    return f"{sum(known) / max(len(known), 1):.5f}" if len(known) == len(losses) else "-"
