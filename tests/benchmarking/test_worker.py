"""The model of a worker is compiled as ``generate`` has it."""

import shutil

import pytest
import torch

from slimrank.benchmarking.latency import run_once
from slimrank.benchmarking.worker import compile_apart


def test_prompts_and_steps_are_compiled_apart(make_model, monkeypatch):
    called = []

    def compile_(forward, dynamic, mode="default"):
        def run(**inputs):
            called.append((mode, inputs["input_ids"].shape[1], dynamic))
            return forward(**inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    model = make_model("llama")
    model.forward = compile_apart(model.forward)
    assert model._supports_logits_to_keep()
    run_once(model, batch=2, context=6, new_tokens=2, fixed_cache=True)
    tuned = ("max-autotune-no-cudagraphs", 1, False)
    assert called == [("default", 6, False), tuned, tuned]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_writes_the_same_tokens(watched):
    model, given = watched("llama")
    run_once(model, batch=2, context=6, new_tokens=5)
    eager = list(given)
    given.clear()
    model.forward = compile_apart(model.forward)
    run_once(model, batch=2, context=6, new_tokens=5, fixed_cache=True)
    torch.compiler.reset()
    assert all(torch.equal(*pair) for pair in zip(eager, given, strict=True))
