"""``slimrank plan``."""

import warnings

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_size, print_table, role, span
from slimrank.errors import CoverageWarning
from slimrank.options import CompressionOptions
from slimrank.planning import plan
from slimrank.report import NeedsReport


@friendly
def plan_command(
    model: opt.Model,
    keep: opt.Keep = None,
    effort: opt.Effort = None,
    method: opt.MethodName = None,
    scope: opt.Scope = None,
    multiple_of: opt.MultipleOf = None,
    allocation: opt.Allocation = None,
    unit: opt.Unit = None,
    layout: opt.Layout = None,
    passes: opt.Passes = None,
    generate: opt.Generate = None,
    within_block: opt.WithinBlock = None,
    order: opt.Order = None,
    refine: opt.Refine = None,
    tune: opt.Tune = None,
    kv_keep: opt.KVKeep = None,
    num_sequences: opt.NumSequences = None,
    sequence_length: opt.SequenceLength = None,
    held_out_sequences: opt.HeldOutSequences = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    stream: opt.Stream = False,
    recipe: opt.Recipe = None,
    json: opt.Json = False,
) -> None:
    """Say what compress would do to MODEL, and take: memory, disk, passes. Reads no weight."""
    wanted = opt.build_recipe(
        recipe,
        budget__param_ratio=keep,
        budget__scope=scope,
        budget__multiple_of=multiple_of,
        effort=effort,
        method=method,
        allocation=allocation,
        global_ranks__unit=unit,
        layout=layout,
        passes=passes,
        generated_sequences=generate,
        within_block=within_block,
        order=order,
        refine__preset=refine,
        tune__epochs=tune,
        kv_cache__keep=kv_keep,
        calibration__num_sequences=num_sequences,
        calibration__sequence_length=sequence_length,
        calibration__held_out_sequences=held_out_sequences,
        targets=targets,
        ignore=ignore,
        dtype=dtype,
    )
    limit = None if memory is None else int(memory * 1e9)
    how = CompressionOptions(device=device, batch_size=batch_size, memory=limit, stream=stream)
    report = plan(model, wanted, how)
    if json:
        print_json(report.model_dump_json(indent=1))
        return
    for message in report.warnings:
        warnings.warn(message, CoverageWarning, stacklevel=1)
    kinds: dict[tuple[str, int, int], list[int | None]] = {}
    for linear in report.linears:
        key = (role(linear.name), linear.out_features, linear.in_features)
        kinds.setdefault(key, []).append(linear.rank)
    rows = [
        (
            name,
            f"{out_features} x {in_features}",
            len(ranks),
            span(low) if (low := [r for r in ranks if r is not None]) else "dense",
        )
        for (name, out_features, in_features), ranks in kinds.items()
    ]
    print_table(f"plan for {report.model}", ("linear", "out x in", "count", "rank"), rows)
    print_size(report.size)
    if report.kv_cache:
        typer.echo(report.kv_cache.line())
    typer.echo(f"a profile would take {report.profile_bytes / 1e9:.2f} GB on disk")
    print_needs(report.needs)


def print_needs(needs: NeedsReport) -> None:
    """Show each phase and what holds most of it; then peaks, disk and passes."""
    rows = []
    for phase in needs.phases:
        held = sorted({**phase.device, **phase.memory}.items(), key=lambda item: -item[1])
        gigabytes = [sum(place.values()) / 1e9 for place in (phase.memory, phase.device)]
        shown = [f"{size:.2f}" for size in gigabytes[: 2 if needs.device_bytes else 1]]
        rows.append((phase.name, *shown, ", ".join(f"{n} {b / 1e9:.2f}" for n, b in held[:3])))
    places = ("memory", "device") if needs.device_bytes else ("memory",)
    print_table("what compress would hold, estimated, GB", ("phase", *places, "most of it"), rows)
    typer.echo(f"peak of memory {needs.memory_bytes / 1e9:.2f} GB, in {needs.largest.name}")
    if needs.device_bytes:
        typer.echo(f"peak of the accelerator's memory {needs.device_bytes / 1e9:.2f} GB")
    disk = max(needs.phases, key=lambda phase: sum(phase.disk.values())).disk
    parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in disk.items())
    typer.echo(
        f"disk {needs.disk_bytes / 1e9:.2f} GB meanwhile ({parts}), "
        f"{needs.stays_bytes / 1e9:.2f} GB stay"
    )
    typer.echo(needs.passes.line())
