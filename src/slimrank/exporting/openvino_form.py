"""OpenVINO: a stateful graph, as optimum-intel and openvino-genai load it."""

from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimrank.checkpoint import reason
from slimrank.errors import CheckpointError
from slimrank.exporting.probe import Step
from slimrank.exporting.traced_call import TracedCall
from slimrank.report import GraphFormName

GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
# beside weights in eight bits the CPU would round activations to eight bits too
FLOAT_ACTIVATIONS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINOForm:
    """Graphs for OpenVINO: the cache is state of a request.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and ``beam_idx``; the output is
    ``logits``. Weights of 16 bits are stored as they are; what is computed in is up to who loads
    the graph.
    """

    name: GraphFormName = "openvino"
    title = "OpenVINO"
    packages: tuple[str, ...] = ("openvino", "transformers.exporters")

    def trace(self, model: Any) -> Any:
        """Make the stateful graph of a model."""
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        call = TracedCall(model)
        config = OpenVINOConfig(dynamic_shapes=call.shapes)
        graph = OpenVINOExporter().export(model, call.inputs, config).program
        graph.set_rt_info("0", ["runtime_options", FLOAT_ACTIVATIONS])
        return graph

    def write(self, graph: Any, folder: Path) -> Path:
        """Write graph and weights, and see that each constant reads back.

        Raises
        ------
        CheckpointError
            If one does not.
        """
        import openvino

        try:
            openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)
            again = openvino.Core().read_model(folder / GRAPH)
        except RuntimeError as error:
            raise CheckpointError(
                f"cannot write {WEIGHTS}: {reason(error)}; is the disk full?"
            ) from error
        if _constants(graph) != _constants(again):
            raise CheckpointError(f"{WEIGHTS} does not read back as it was written")
        return folder / WEIGHTS

    def run(self, folder: Path) -> Step:
        """Load what was written, to run on the CPU in float32 with an empty cache."""
        import openvino

        model = openvino.Core().compile_model(folder / GRAPH, "CPU", EXACT)
        names = {name for port in model.inputs for name in port.names}
        request = model.create_infer_request()

        def step(inputs: dict[str, Tensor]) -> Tensor:
            given = {name: t.numpy() for name, t in inputs.items() if name in names}
            given["beam_idx"] = torch.arange(len(inputs["input_ids"]), dtype=torch.int32).numpy()
            return torch.from_numpy(request.infer(given)["logits"].copy())

        return step


def _constants(graph: Any) -> Counter[tuple[str, bytes]]:
    """What constants a graph has, whatever their names: reading gives new ones."""
    constants = (each for each in graph.get_ops() if each.get_type_name() == "Constant")
    return Counter(
        (str(each.get_element_type()), sha256(each.data.tobytes()).digest()) for each in constants
    )
