"""A process that holds one model and runs what it is told, in turns with others.

``python -m slimrank.benchmarking.worker``: orders come in, and answers go out, one JSON object a
line. A model in a process of its own has a peak of memory of its own.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from slimrank.benchmarking.latency import run_once
from slimrank.environment import environment, peak_bytes
from slimrank.errors import SlimrankError, in_one_line
from slimrank.nn import detach_latent_cache
from slimrank.source import open_model, parse_source, require_device

WARM_UP = 16  # tokens; on a CPU nothing depends on the shapes that have been


class Holder:
    """The model of this process."""

    model: Any = None
    is_compiled = False

    def load(
        self, model: str, dtype: str, device: str | None, threads: int, compiled: bool
    ) -> dict[str, Any]:
        """Take a model, and say what it is."""
        torch.set_num_threads(threads)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        require_device(device)
        before = peak_bytes(torch.device(device or "cpu"))
        self.model = open_model(parse_source(model), dtype, device=device).eval()
        self.is_compiled = compiled
        if compiled:
            detach_latent_cache(self.model)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        config = self.model.config.get_text_config()
        return {
            "before_bytes": before,
            "weight_bytes": sum(tensor.nbytes for tensor in tensors),
            "longest": getattr(config, "max_position_embeddings", None),
            "environment": environment(self.model),
        }

    def warm_up(self, batch: int, context: int, new_tokens: int) -> dict[str, Any]:
        """Run once, uncounted, and compile for these shapes if that is asked for."""
        if self.is_compiled:
            self._compile()
            self.run(batch, context, new_tokens)
            return {}
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        run_once(self.model, batch, min(context, WARM_UP) if on_cpu else context, 1)
        return {}

    def _compile(self) -> None:
        """Let go of graphs of other shapes, with their copies of weights, and begin anew."""
        torch.compiler.reset()
        self.model.forward = compile_apart(type(self.model).forward.__get__(self.model))

    def run(self, batch: int, context: int, new_tokens: int) -> dict[str, Any]:
        """Run once."""
        figures = run_once(self.model, batch, context, new_tokens, fixed_cache=self.is_compiled)
        device = next(self.model.parameters()).device
        return {**figures._asdict(), "peak_bytes": peak_bytes(device)}


def compile_apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Prompts and steps apart, as ``generate`` does; products of a step are timed and chosen.

    A step is short and runs often: there it is worth the wait.
    """
    prompt = torch.compile(forward, dynamic=False)
    step = torch.compile(forward, dynamic=False, mode="max-autotune-no-cudagraphs")

    @wraps(forward)  # transformers reads the arguments' names
    def either(*, input_ids: torch.Tensor, **others: Any) -> Any:
        return (step if input_ids.shape[1] == 1 else prompt)(input_ids=input_ids, **others)

    return either


def main() -> None:
    """Answer until nobody asks."""
    holder = Holder()
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "load": holder.load,
        "warm_up": holder.warm_up,
        "run": holder.run,
    }
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = orders[order.pop("do")](**order)
            except (SlimrankError, MemoryError, RuntimeError) as error:
                answer = {"error": in_one_line(str(error))}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
