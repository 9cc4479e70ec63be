"""``slimrank plan``."""

import warnings

import typer

from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json, print_size, print_table, role, span
from slimrank.errors import CoverageWarning
from slimrank.planning import plan


@friendly
def plan_command(
    model: opt.Model,
    keep: opt.Keep = None,
    effort: opt.Effort = None,
    method: opt.MethodName = None,
    layout: opt.Layout = None,
    scope: opt.Scope = None,
    multiple_of: opt.MultipleOf = None,
    kv_keep: opt.KVKeep = None,
    num_sequences: opt.NumSequences = None,
    sequence_length: opt.SequenceLength = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    dtype: opt.Dtype = None,
    recipe: opt.Recipe = None,
    json: opt.Json = False,
) -> None:
    """Say what compress would do to MODEL: ranks, parameters, bytes, memory. Reads no weight."""
    wanted = opt.build_recipe(
        recipe,
        budget__param_ratio=keep,
        budget__scope=scope,
        budget__multiple_of=multiple_of,
        effort=effort,
        method=method,
        layout=layout,
        kv_cache__keep=kv_keep,
        calibration__num_sequences=num_sequences,
        calibration__sequence_length=sequence_length,
        targets=targets,
        ignore=ignore,
        dtype=dtype,
    )
    report = plan(model, wanted)
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
    memory = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in report.memory_bytes.items())
    typer.echo(f"memory while calibrating, estimated, GB: {memory}")
