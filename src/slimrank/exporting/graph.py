"""A compressed folder becomes a graph of its factors for another runtime, run and compared."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from slimrank.checkpoint import (
    copy_other_files,
    load,
    renamed_when_done,
    told_as,
    weight_file_bytes,
)
from slimrank.errors import ModelError, extra_needed
from slimrank.exporting.opening import LEFT_OUT, open_folder
from slimrank.exporting.probe import Probe, Step
from slimrank.exporting.traceable import make_traceable
from slimrank.nn import detach_latent_cache
from slimrank.report import ExportReport, GraphFormName


@runtime_checkable
class GraphForm(Protocol):
    """How graphs for one runtime are made, written and run."""

    name: GraphFormName
    title: str
    packages: tuple[str, ...]

    def trace(self, model: Any) -> Any:
        """Make the graph of a model whose linears are traceable."""

    def write(self, graph: Any, folder: Path) -> Path:
        """Write it, read it back, compare; give the file that holds the weights."""

    def run(self, folder: Path) -> Step:
        """Load what was written, to run on the CPU in float32 with an empty cache."""


@torch.no_grad()
def export_graph(folder: str | Path, out: str | Path, form: GraphForm) -> ExportReport:
    """Write the factors of a compressed folder as a graph that runs with a cache.

    The new folder needs neither slimrank nor torch. It is written under a passing name, read back,
    and run before it gets its own: two prompts, one of them padded on the left, and a few steps.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank; factors may be in eight bits.
    out : str or Path
        Must not exist.
    form : GraphForm
        `OnnxForm()` or `OpenVINOForm()`.

    Returns
    -------
    ExportReport
        With how far logits are from those of the model in float32.

    Raises
    ------
    SlimrankError
        If a package is not installed.
    ModelError
        If the model cannot be traced, or the graph gives other logits.
    CheckpointError
        If `folder` is none of ours or damaged; if `out` exists, the disk is full, or what is read
        back is not what was written. Nothing remains then.
    NumericalError
        If a weight is not finite.
    """
    source, out = Path(folder), Path(out)
    with extra_needed(f"{form.title} needs {', '.join(form.packages)}", form.name):
        for package in form.packages:
            import_module(package)
    model = open_folder(source, out)
    with told_as(ModelError, f"{source} does not run with a cache of keys and values"):
        probe = Probe.of(_in_float32(model, source))
    linears = make_traceable(model)
    model.hf_quantizer.remove_quantization_config(model)
    what = f"{type(model).__name__} as {form.title}"
    with told_as(ModelError, f"cannot export {what}"), _quietly():
        graph = form.trace(model)
    with renamed_when_done(out) as passing:
        model.config.save_pretrained(passing)
        copy_other_files(source, passing, LEFT_OUT)
        weights = form.write(graph, passing)
        with told_as(ModelError, f"cannot run {what}"):
            apart = probe.require_near(form.run(passing), what)
        after = weights.stat().st_size
    return ExportReport(
        form=form.name,
        source=str(source),
        linears=linears,
        weight_bytes_before=weight_file_bytes(source),
        weight_bytes=after,
        logits_apart=apart,
    )


def _in_float32(model: Any, source: Path) -> Any:
    """The model itself, or another one if its weights are of 16 bits."""
    if model.dtype != torch.float32:
        model = load(source, dtype=torch.float32)
    detach_latent_cache(model)
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Around exporters: they print and log how far they are, and whole graphs where they fail."""
    before = logging.root.manager.disable
    sink = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
