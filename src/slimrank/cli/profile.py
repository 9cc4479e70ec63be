"""``slimrank profile``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from slimrank.checkpoint.profile_state import UNFINISHED_PROFILE
from slimrank.cli import options as opt
from slimrank.cli.output import (
    friendly,
    print_json,
    print_table,
    say_if_it_begins,
    says_what_is_kept,
    stderr,
    track,
)
from slimrank.options import CompressionOptions
from slimrank.planning import plan_profile
from slimrank.profiling import profile

GO_ON = "finished blocks are kept; go on: slimrank profile … --resume"


@partial(friendly, is_shared=True)
def profile_command(
    model: opt.Model,
    out: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="Folder to write; must not exist.")
    ],
    effort: opt.Effort = None,
    method: opt.MethodName = None,
    calibration: opt.Calibration = None,
    num_sequences: opt.NumSequences = None,
    sequence_length: opt.SequenceLength = None,
    held_out_sequences: opt.HeldOutSequences = None,
    seed: opt.Seed = None,
    targets: opt.Targets = None,
    ignore: opt.Ignore = None,
    kv: Annotated[
        bool,
        typer.Option(
            "--kv",
            help="Keep what --kv-keep may ask for later: whole bases of keys and values, fused "
            "projections split.",
        ),
    ] = False,
    spectra_only: Annotated[
        bool,
        typer.Option(
            "--spectra-only", help="Keep no bases: a few MB, enough to analyse, not to compress."
        ),
    ] = False,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    stream: opt.Stream = False,
    resume: opt.ResumeProfile = False,
    recipe: opt.Recipe = None,
    json: opt.Json = False,
) -> None:
    """Calibrate on MODEL once, and keep what every size is made from in PROFILE."""
    wanted = opt.build_recipe(
        recipe,
        budget__param_ratio=None if recipe else 1.0,
        effort=effort,
        method=method,
        calibration__source=calibration,
        calibration__num_sequences=num_sequences,
        calibration__sequence_length=sequence_length,
        calibration__held_out_sequences=held_out_sequences,
        calibration__seed=seed,
        targets=targets,
        ignore=ignore,
        dtype=dtype,
    )
    size = plan_profile(model, wanted, kv, spectra_only)
    less = "" if spectra_only else "; --spectra-only keeps less"
    stderr.print(f"the profile will take about {size / 1e9:.3f} GB{less}")
    limit = None if memory is None else int(memory * 1e9)
    how = CompressionOptions(
        device=device, batch_size=batch_size, memory=limit, track=track, stream=stream
    )
    say_if_it_begins(resume, UNFINISHED_PROFILE.is_kept(out) or out.exists())
    with says_what_is_kept(lambda: GO_ON if UNFINISHED_PROFILE.is_kept(out) else None):
        found = profile(
            model,
            wanted,
            out,
            for_kv_cache=kv,
            spectra_only=spectra_only,
            options=how,
            resume=resume,
        )
    manifest = found.manifest
    if json:
        print_json(manifest.model_dump_json(indent=1))
        return
    rows = [(number, f"{value:.4f}") for number, value in enumerate(manifest.importance)]
    print_table("block influence", ("block", "1 - cos"), rows)
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in manifest.seconds.items())
    size = sum(path.stat().st_size for path in out.iterdir())
    typer.echo(f"{len(manifest.linears)} linears, {manifest.tokens} tokens; {seconds}")
    typer.echo(f"written to {out}, {size / 1e6:.1f} MB, read back and compared")
