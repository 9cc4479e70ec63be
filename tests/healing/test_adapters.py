"""Adapters on the factors: nothing at the start, nothing left at the end but what they learnt."""

import sys

import pytest
import torch
from torch import nn

from slimrank import LowRankLinear, load
from slimrank.checkpoint import read_folder
from slimrank.errors import SlimrankError
from slimrank.healing.adapters import add_adapters, merge_adapters
from tiny.folders import logits_of

RANK = 2


def factors_of(model):
    return [m for m in model.modules() if isinstance(m, LowRankLinear)]


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "opt", "phi3"])
def test_merged_is_the_same_function(family, layout, make_compressed, probe):
    model, _ = make_compressed(family, layout=layout)
    expected, names = logits_of(model, probe), list(model.state_dict())
    modules = [type(m) for m in model.modules()]
    trained = add_adapters(model, RANK, seed=0)
    assert torch.equal(logits_of(model, probe), expected)
    assert {p.dtype for p in trained} == {torch.float32}
    layers = factors_of(model)
    sides = [2 * m.rank + m.in_features + m.expand.out_features for m in layers]
    assert sum(p.numel() for p in trained) == RANK * sum(sides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    unmerged = logits_of(model, probe)
    assert not torch.allclose(unmerged, expected, rtol=1e-2, atol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(logits_of(model, probe), unmerged, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == modules
    assert not hasattr(model, "peft_config")


def test_they_are_drawn_from_the_seed_alone(make_compressed):
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        model, _ = make_compressed("llama")
        values = [p.detach().clone() for p in add_adapters(model, RANK, seed)]
        drawn.append(torch.cat([value.flatten() for value in values]))
        assert sorted({bool(value.any()) for value in values}) == [False, True]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pivots_that_are_all_rows_have_no_expansion(make_compressed, probe):
    model, _ = make_compressed("llama", layout="pivoted")
    linear = nn.Linear(32, 8, bias=False)
    model.model.layers[0].self_attn.k_proj = LowRankLinear(32, 16, 16, bias=False, pivoted=True)
    del linear
    trained = add_adapters(model, RANK, seed=0)
    assert all(parameter.numel() for parameter in trained)
    merge_adapters(model)
    assert logits_of(model, probe).isfinite().all()


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_a_healing_by_adapters(layout, make_small, run, tmp_path):
    folder = make_small(layout=layout)
    report = run(folder, settings={"lora_rank": RANK, "learning_rate": 1e-2})
    assert report.divergence < report.checks[0].divergence
    assert report.kept_step > 0
    before, after = (load(path).state_dict() for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if ".latent." in n or ".expand." in n}
    (remark,) = [w for w in read_folder(tmp_path / "out").report.warnings if "end to end" in w]
    assert f"by adapters of rank {RANK}" in remark
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_without_peft_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SlimrankError, match=r"adapters need peft: pip install 'slimrank\[heal\]'"):
        run(settings={"lora_rank": RANK})
    assert not list(tmp_path.iterdir())
    run()
