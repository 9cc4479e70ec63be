"""What is alive at once while a block runs, told by running it on tensors without data.

On the meta device an operation gives a shape and takes no memory. Storages are counted as they come
and go, so nothing here knows what a block does inside.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from slimrank.calibration.replay import Call, blocks_of, call_block, passing_through
from slimrank.model import Anatomy

Extra = Callable[[int], int]  # from the tokens that a linear receives to bytes beside them


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the storages that operations make, while they are alive.

    Parameters
    ----------
    known : iterable of Tensor
        Not counted: weights and inputs, which are there anyway.

    Examples
    --------
    >>> with LiveBytes(()) as live:
    ...     first = torch.empty(10, dtype=torch.float32, device="meta")
    ...     second = first + 1
    ...     del first
    >>> live.now, live.peak
    (40, 80)
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def bump(self, size: int) -> None:
        """Count bytes that come and go at once."""
        self.peak = max(self.peak, self.now + size)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        weakref.finalize(storage, self._gone, key)
        self.now += size
        self.bump(0)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class _Attention(torch.autograd.Function):
    """Attention by a kernel that holds no matrix of all pairs of tokens."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _output = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _FlashAttention(TorchFunctionMode):
    """On the meta device torch would take the way that holds that matrix; elsewhere it does not."""

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch in front of a block, without data.

    Parameters
    ----------
    hidden : Tensor of shape (batch, length, hidden)
    call : tuple
        What the block is called with beside it.
    """

    hidden: Tensor
    call: Call

    @property
    def tokens(self) -> int:
        """How many."""
        return self.hidden.shape[:2].numel()


def record_samples(model: Any, anatomy: Anatomy, batch: int, length: int) -> list[Sample] | None:
    """What each block is called with; None if that cannot be told without data.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    anatomy : Anatomy
    batch, length : int
    """
    hidden: list[Tensor] = []
    calls: list[Call] = []
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, length, length, device="meta")
    blocks = blocks_of(model, anatomy)
    backbone = getattr(model, "base_model", model)
    try:
        with torch.no_grad(), passing_through(blocks, anatomy.extra_outputs, hidden, calls):
            backbone(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    if len(hidden) != len(blocks):
        return None

    def unmasked(value: Any) -> Any:  # what a causal model without padding is given
        return None if value is mask else value

    return [
        Sample(states, (tree_map(unmasked, args), tree_map(unmasked, kwargs)))
        for states, (args, kwargs) in zip(hidden, calls, strict=True)
    ]


def forward_bytes(block: nn.Module, sample: Sample, extra: Mapping[str, Extra]) -> int | None:
    """Most that a block holds at once beside its weights and inputs; None if it needs data.

    Parameters
    ----------
    block : nn.Module
        On the meta device.
    sample : Sample
    extra : mapping of str to callable
        By linear within the block: bytes that whoever looks at its inputs takes meanwhile.
    """

    def run(live: LiveBytes) -> None:
        with torch.no_grad(), _looked_at(block, extra, live):
            call_block(block, sample.hidden, sample.call)

    return _peak(block, sample, run)


def backward_bytes(
    block: nn.Module, sample: Sample, names: Iterable[str], extra: Mapping[str, Extra]
) -> int | None:
    """The same with a graph, and gradients at the outputs of linears, as `pull_back` has them."""
    names = list(names)

    def run(live: LiveBytes) -> None:
        kept: list[Tensor] = []

        def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            kept.append(output if output.requires_grad else output.requires_grad_())
            return output.clone()

        with ExitStack() as stack:
            for name in names:
                linear = block.get_submodule(name)
                stack.callback(linear.register_forward_hook(watch).remove)
            stack.enter_context(torch.enable_grad())
            states = sample.hidden.detach().requires_grad_()
            output = call_block(block, states.clone(), sample.call)
        edges = [get_gradient_edge(tensor) for tensor in kept]
        entrance = get_gradient_edge(states)
        kept.clear()
        found = torch.autograd.grad(output, [entrance, *edges], torch.empty_like(output))
        wide = [(g.float() / 2) for g in found]
        del output, found
        for name, gradient in zip(names, wide[1:], strict=False):
            live.bump(extra[name](gradient.shape[:-1].numel()) if name in extra else 0)

    return _peak(block, sample, run)


def training_bytes(block: nn.Module, sample: Sample) -> int | None:
    """The same while all parameters of a block that ask for it get gradients, which count too."""

    def run(_live: LiveBytes) -> None:
        with torch.enable_grad():
            output = call_block(block, sample.hidden.clone(), sample.call)
            loss = (output.float() - torch.empty_like(output).float()).square().sum()
        torch.autograd.backward(loss)

    found = _peak(block, sample, run)
    for parameter in block.parameters():
        parameter.grad = None
    return found


def _peak(block: nn.Module, sample: Sample, run: Callable[[LiveBytes], None]) -> int | None:
    """Largest count; what needs data (routing to experts, as a rule) cannot be told."""
    known = [*block.parameters(), *block.buffers(), sample.hidden]
    known += [leaf for leaf in tree_leaves(sample.call) if isinstance(leaf, Tensor)]
    try:
        with _FlashAttention(), LiveBytes(known) as live:
            run(live)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return int(live.peak)


@contextmanager
def _looked_at(block: nn.Module, extra: Mapping[str, Extra], live: LiveBytes) -> Iterator[None]:
    with ExitStack() as stack:
        for name, size in extra.items():

            def look(_module: nn.Module, args: Any, size: Extra = size) -> None:
                live.bump(size(args[0].shape[:-1].numel()))

            handle = block.get_submodule(name).register_forward_pre_hook(look)
            stack.callback(handle.remove)
        yield
