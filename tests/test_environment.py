"""Peaks are of the memory that a model is in."""

import torch

from slimrank.environment import peak_bytes


def test_a_peak_is_resident_or_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    resident = peak_bytes()
    assert resident > 1_000_000
    assert peak_bytes(torch.device("cpu")) >= resident
    assert peak_bytes(torch.device("cuda", 1)) == 8
