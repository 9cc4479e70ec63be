"""A compressed folder in forms that need no slimrank."""

from slimrank.exporting.dense import export_dense
from slimrank.exporting.forms import FORMS, GRAPHS, export
from slimrank.exporting.graph import GraphForm, export_graph
from slimrank.exporting.remote_code import export_remote_code

__all__ = [
    "FORMS",
    "GRAPHS",
    "GraphForm",
    "export",
    "export_dense",
    "export_graph",
    "export_remote_code",
]
