"""Which forms a compressed folder can be exported to, by name."""

from pathlib import Path

from slimrank.errors import RecipeError
from slimrank.exporting.dense import export_dense
from slimrank.exporting.graph import GraphForm, export_graph
from slimrank.exporting.onnx_form import OnnxForm
from slimrank.exporting.openvino_form import OpenVINOForm
from slimrank.exporting.remote_code import export_remote_code
from slimrank.report import ExportReport, RemoteCodeReport

GRAPHS: dict[str, GraphForm] = {form.name: form for form in (OnnxForm(), OpenVINOForm())}
FORMS = ("dense", *GRAPHS, "remote-code")


def export(
    folder: str | Path, out: str | Path, to: str = "dense"
) -> ExportReport | RemoteCodeReport:
    """Write a compressed folder in a form that needs no slimrank.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank.
    out : str or Path
        Must not exist.
    to : {'dense', 'onnx', 'openvino', 'remote-code'}
        An ordinary checkpoint with the factors multiplied out, a graph of the factors, or a copy
        with the modelling file.

    Returns
    -------
    ExportReport or RemoteCodeReport

    Raises
    ------
    RecipeError
        If `to` is none of these.
    SlimrankError
        As `export_dense`, `export_graph` and `export_remote_code`.

    Examples
    --------
    >>> export("model-slim", "OUT", to="gguf")
    Traceback (most recent call last):
    slimrank.errors.RecipeError: --to is 'gguf'; it is one of dense, onnx, openvino, remote-code
    """
    if to not in FORMS:
        raise RecipeError(f"--to is '{to}'; it is one of {', '.join(FORMS)}")
    if to in GRAPHS:
        return export_graph(folder, out, GRAPHS[to])
    return export_dense(folder, out) if to == "dense" else export_remote_code(folder, out)
