"""ONNX: what onnxruntime runs, with names that its users know."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.checkpoint import told_as
from slimrank.errors import CheckpointError
from slimrank.exporting.probe import Step
from slimrank.exporting.traced_call import TracedCall
from slimrank.report import GraphFormName

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
STATE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
SIDES = {"input": "past_key_values", "output": "present"}
BATCH, PAST, NEW = "batch_size", "past_sequence_length", "sequence_length"
ALL = f"{PAST} + {NEW}"
FREE = {"attention_mask": (BATCH, ALL)}
ONLY_ERRORS = 3  # of what onnxruntime logs


class OnnxForm:
    """Graphs for onnxruntime: the cache goes in and comes out.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.N.key`` and
    ``.value``; outputs ``logits``, ``present.N.key`` and ``.value``. Arithmetic is in float32,
    since onnxruntime multiplies few numbers of 16 bits on CPUs; weights of 16 bits are stored so.
    """

    name: GraphFormName = "onnx"
    title = "ONNX"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime", "transformers.exporters")

    def trace(self, model: Any) -> Any:
        """Make the graph of a model, with its weights under the names that they have there."""
        from transformers.exporters import OnnxConfig, OnnxExporter

        stored = model.dtype
        model.float()
        call = TracedCall(model)
        # what the optimiser does, onnxruntime does when it loads; here it would copy tied weights
        config = OnnxConfig(dynamic_shapes=call.shapes, optimize=False)
        graph = OnnxExporter().export(model, call.inputs, config).program
        _name(graph.graph)
        _forget_origins(graph.graph)
        if stored != torch.float32:
            _narrow(graph.graph, stored)
        return graph

    def write(self, graph: Any, folder: Path) -> Path:
        """Write graph and weights, and see that each weight reads back.

        Raises
        ------
        CheckpointError
            If one does not.
        """
        import onnx_ir

        onnx_ir.save(graph, folder / GRAPH, external_data=WEIGHTS)
        with told_as(CheckpointError, f"{WEIGHTS} does not read back"):
            again = onnx_ir.load(folder / GRAPH).graph.initializers
            for name, value in graph.graph.initializers.items():
                if again[name].const_value.tobytes() != value.const_value.tobytes():
                    raise CheckpointError(f"{name} does not read back as it was written")
        return folder / WEIGHTS

    def run(self, folder: Path) -> Step:
        """Load what was written, to run on the CPU with an empty cache."""
        import numpy as np
        import onnxruntime

        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = ONLY_ERRORS
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(folder / GRAPH, quiet, providers)
        shapes = {each.name: each.shape for each in session.get_inputs()}
        names = [each.name.replace("present", SIDES["input"]) for each in session.get_outputs()]
        cache: dict[str, Any] = {}

        def step(inputs: dict[str, Tensor]) -> Tensor:
            batch = len(inputs["input_ids"])
            for name in names[1:]:
                _, heads, _, width = shapes[name]
                cache.setdefault(name, np.zeros((batch, heads, 0, width), np.float32))
            given = {name: t.numpy() for name, t in inputs.items() if name in shapes}
            logits, *states = session.run(None, given | cache)
            cache.update(zip(names[1:], states, strict=True))
            return torch.from_numpy(logits)

        return step


def _name(graph: Any) -> None:
    """Give inputs, outputs and their axes the names that users of onnxruntime know."""
    import onnx_ir

    for value in (*graph.inputs, *graph.outputs):
        state = STATE.fullmatch(value.name)
        if state is not None:
            side, layer, what = state.groups()
            value.name = f"{SIDES[side]}.{layer}.{what}"
            length = PAST if side == "input" else ALL
            value.shape = onnx_ir.Shape([BATCH, value.shape[1], length, value.shape[3]])
        else:
            axes = FREE.get(value.name, (BATCH, NEW))
            value.shape = onnx_ir.Shape([*axes, *value.shape[2:]])


def _forget_origins(graph: Any) -> None:
    """Leave out lines of source and shapes by other names: both are for who debugs an exporter."""
    kept = {*graph.inputs, *graph.outputs}
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = None
    for value in (*kept, *graph.initializers.values()):
        value.metadata_props.clear()


def _narrow(graph: Any, dtype: torch.dtype) -> None:
    """Store what loses nothing by it in 16 bits, to be widened where it is used."""
    import onnx_ir

    for value in list(graph.initializers.values()):
        wide = value.const_value
        if wide.dtype != onnx_ir.DataType.FLOAT:
            continue
        exact = torch.from_numpy(wide.numpy())
        narrow = exact.to(dtype)
        if not torch.equal(narrow.float(), exact):
            continue
        users = list(value.uses())
        value.const_value = onnx_ir.tensor(narrow, name=value.name)
        value.dtype = value.const_value.dtype
        cast = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT})
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        graph.insert_before(graph[0], cast)
