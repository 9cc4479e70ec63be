"""Exported folders run by their own runtimes, as somebody without slimrank runs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from torch import Tensor

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def onnx_tokens(folder: Path, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Greedy tokens after a prompt, by onnxruntime."""
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    past = {
        each.name: np.zeros((len(ids), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }

    def logits(inputs: dict[str, Any]) -> Any:
        outputs = session.run(None, inputs | past)
        past.update(zip(past, outputs[1:], strict=True))
        return outputs[0]

    return _greedy(logits, ids, mask, count)


def openvino_tokens(folder: Path, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Greedy tokens after a prompt, by OpenVINO in float32."""
    model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", EXACT)
    request = model.create_infer_request()
    beams = {"beam_idx": np.arange(len(ids), dtype=np.int32)}
    return _greedy(lambda inputs: request.infer(inputs | beams)["logits"], ids, mask, count)


def _greedy(logits: Callable[[dict[str, Any]], Any], ids: Tensor, mask: Tensor, count: int) -> Any:
    given, attended, tokens = ids.numpy(), mask.numpy(), []
    for _ in range(count):
        positions = np.maximum(attended.cumsum(1) - 1, 0)[:, -given.shape[1] :]
        inputs = {"input_ids": given, "attention_mask": attended, "position_ids": positions}
        given = logits(inputs)[:, -1:].argmax(-1)
        attended = np.concatenate([attended, np.ones_like(given)], 1)
        tokens.append(given)
    return torch.from_numpy(np.concatenate(tokens, 1))


def torch_tokens(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Greedy tokens after a prompt, by transformers."""
    model.generation_config.eos_token_id = None
    found = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    tokens: Tensor = found[:, ids.shape[1] :]
    return tokens


TOKENS = {"onnx": onnx_tokens, "openvino": openvino_tokens}
