"""Which forms a compressed folder can be exported to, by name."""

from pathlib import Path

from slimrank.errors import RecipeError
from slimrank.exporting.dense import export_dense
from slimrank.exporting.graph import GraphForm, export_graph
from slimrank.exporting.onnx_form import OnnxForm
from slimrank.exporting.openvino_form import OpenVINOForm
from slimrank.report import ExportReport

GRAPHS: dict[str, GraphForm] = {form.name: form for form in (OnnxForm(), OpenVINOForm())}
FORMS = ("dense", *GRAPHS)


def export(folder: str | Path, out: str | Path, to: str = "dense") -> ExportReport:
    """Write a compressed folder in a form that needs no slimrank.

    Parameters
    ----------
    folder : str or Path
        Written by slimrank.
    out : str or Path
        Must not exist.
    to : {'dense', 'onnx', 'openvino'}
        An ordinary checkpoint with the factors multiplied out, or a graph of the factors.

    Returns
    -------
    ExportReport

    Raises
    ------
    RecipeError
        If `to` is none of these.
    SlimrankError
        As `export_dense` and `export_graph`.

    Examples
    --------
    >>> export("model-slim", "OUT", to="gguf")
    Traceback (most recent call last):
    slimrank.errors.RecipeError: --to is 'gguf'; it is one of dense, onnx, openvino
    """
    if to not in FORMS:
        raise RecipeError(f"--to is '{to}'; it is one of {', '.join(FORMS)}")
    return export_dense(folder, out) if to == "dense" else export_graph(folder, out, GRAPHS[to])
