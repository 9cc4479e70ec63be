"""The kernel of one token, against the way that any device can go."""

from importlib.util import find_spec

import pytest
import torch

from slimrank.nn import LowRankLinear, row_placement

with_kernel = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def layer(width: int, rank: int, dtype: torch.dtype) -> LowRankLinear:
    draw = torch.Generator().manual_seed(0)
    made = LowRankLinear(width, width, rank, dtype=dtype, pivoted=True).requires_grad_(False)
    made.latent.weight.normal_(0, width**-0.5, generator=draw)
    made.expand.weight.normal_(0, rank**-0.5, generator=draw)
    made.pivots = torch.randperm(width, generator=draw)[:rank].to(torch.int32)
    return made


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows by one for each time that the kernel runs."""
    found: list[int] = []
    expand = row_placement.triton_kernel()
    monkeypatch.setattr(
        row_placement, "triton_kernel", lambda: lambda *a: found.append(1) or expand(*a)
    )
    return found


@pytest.mark.gpu
@with_kernel
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "rank"), [(9, 4), (64, 64), (576, 317), (4096, 3000)])
def test_one_token(monkeypatch, calls, width, rank, dtype, shape):
    made = layer(width, rank, dtype).cuda()
    inputs = torch.randn(*shape, width, dtype=dtype).cuda()
    monkeypatch.setattr(row_placement, "_COMPILED", set())
    with torch.no_grad():
        found = made(inputs)
        assert len(calls) == 1
        made(inputs)
        assert len(calls) == 1  # from Python the common way is quicker
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = made(inputs)
    assert len(calls) == 2
    graph.replay()
    expected = made(inputs)  # with gradients: another way
    torch.testing.assert_close(captured, found, rtol=0, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@with_kernel
def test_hooks_and_doubles_go_the_other_way(calls):
    made = layer(64, 20, torch.float32).cuda()
    handle = made.expand.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        made(torch.ones(64).cuda())
        handle.remove()
        made.double()(torch.ones(64).double().cuda())
    assert not calls


@pytest.fixture
def capturing(monkeypatch):
    """Says whether a graph is captured."""
    state = {"now": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["now"])
    monkeypatch.setattr(row_placement, "_COMPILED", set())
    monkeypatch.setattr(row_placement, "_WITHOUT_KERNEL", [])
    return state


def by_kernel(made):
    return row_placement._by_kernel(torch.ones(4), made.expand.weight, made.row_numbers())


def test_a_kernel_that_cannot_be_built_is_tried_once(monkeypatch, capturing):
    tried = []

    def expand(*_):
        tried.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(row_placement, "_imported_kernel", lambda: expand)
    made = layer(16, 4, torch.float32)
    assert by_kernel(made) is None
    assert by_kernel(made) is None
    assert tried == [1]
    assert row_placement.triton_kernel() is None


def test_it_is_compiled_before_a_graph_is_captured_and_runs_in_it(monkeypatch, capturing):
    placed, made = torch.ones(16), layer(16, 4, torch.float32)
    monkeypatch.setattr(row_placement, "_imported_kernel", lambda: lambda *_: placed)
    capturing["now"] = True
    assert by_kernel(made) is None  # it would be compiled within the graph
    capturing["now"] = False
    assert by_kernel(made) is placed
    assert by_kernel(made) is None
    capturing["now"] = True
    assert by_kernel(made) is placed
