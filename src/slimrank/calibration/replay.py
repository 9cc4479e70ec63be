"""Run a model one block at a time, with what the model itself hands to each block.

The blocks' arguments beside the hidden states (masks, rotary embeddings, positions) are recorded by
running the model with every block replaced by one that returns its input. So sliding windows, local
rotary bases and whatever a new architecture invents come from the model's own code. That hidden
states are all that flows from block to block is checked against the real model, once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.calibration.store import ActivationStore
from slimrank.calibration.windows import TokenWindows
from slimrank.errors import ModelError
from slimrank.model import Anatomy, device_of

Call = tuple[tuple[Any, ...], dict[str, Any]]

PASSING = "passing"


@dataclass(frozen=True, slots=True)
class Batch:
    """Hidden states of one batch on their way through the blocks.

    Parameters
    ----------
    hidden : Tensor of shape (batch, length, hidden)
        Input of the next block, on the CPU between blocks.
    calls : tuple
        For each block, the arguments beside the hidden states, shared between batches.
    """

    hidden: Tensor
    calls: tuple[Call, ...]


class Batches:
    """Batches by number, in front of one block; past its limit the store has them on disk.

    Parameters
    ----------
    store : ActivationStore
        Holds hidden states under ``("passing", number)``. Copies none that fit.

    Examples
    --------
    >>> with ActivationStore(limit=0) as store:
    ...     batches = Batches(store)
    ...     batches.append(Batch(torch.zeros(1, 2, 3), ()))
    ...     batches[0] = Batch(torch.ones(1, 2, 3), ())
    ...     len(batches), float(batches[0].hidden.sum()), store.bytes_on_disk
    (1, 6.0, 24)
    """

    def __init__(self, store: ActivationStore) -> None:
        self.store = store
        self._calls: list[tuple[Call, ...]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, number: int) -> Batch:
        number = range(len(self))[number]
        return Batch(self.store.get((PASSING, number)), self._calls[number])

    def __setitem__(self, number: int, batch: Batch) -> None:
        """Keep another in its place; nobody else may change it."""
        number = range(len(self))[number]
        self._calls[number] = batch.calls
        self.store.put_rows((PASSING,), (number,), batch.hidden[None], given_away=True)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))

    def append(self, batch: Batch) -> None:
        """Keep one more; nobody else may change it."""
        self._calls.append(batch.calls)
        self[-1] = batch

    def drop(self) -> None:
        """Let go of all of them, on disk too."""
        self._calls.clear()
        self.store.drop_kind(PASSING)


@torch.no_grad()
def embed_batches(
    model: nn.Module,
    anatomy: Anatomy,
    windows: TokenWindows,
    batch_size: int,
    store: ActivationStore | None = None,
) -> Batches:
    """Hidden states in front of the first block, and the arguments of all blocks.

    The last batch is one window: it is the one whose tokens are held against its moments.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
    windows : TokenWindows
    batch_size : int
        Windows at once.
    store : ActivationStore, optional
        Where the hidden states wait; in memory if left out.

    Raises
    ------
    ModelError
        If running block by block does not give what the model gives.
    CheckpointError
        If the disk is full.
    """
    first = next(windows.batches(1))[:, :16]
    check_replay(model, anatomy, first)
    batches = Batches(store or ActivationStore())
    known: list[tuple[Call, ...]] = []
    *most, last = windows.batches(batch_size)
    for ids in (*most, *([last[:-1]] if len(last) > 1 else []), last[-1:]):
        hidden, calls = record_calls(model, anatomy, ids)
        same = next((old for old in known if equal_calls(old, calls)), None)
        if same is None:
            known.append(calls)
        batches.append(Batch(hidden, same or calls))
    return batches


def call_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden states that a block makes of others, on its device, with gradients if they are on.

    Parameters
    ----------
    block : nn.Module
        Gives hidden states, or a tuple that begins with them.
    hidden : Tensor of shape (batch, length, hidden)
        On any device.
    call : tuple
        The arguments beside the hidden states.
    """
    args, kwargs = call
    output = block(hidden.to(device_of(block)), *args, **kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@torch.no_grad()
def run_block(block: nn.Module, index: int, batch: Batch) -> Batch:
    """Take one batch through one block.

    Parameters
    ----------
    block : nn.Module
    index : int
        Its position.
    batch : Batch
    """
    return replace(batch, hidden=call_block(block, batch.hidden, batch.calls[index]).cpu())


@torch.no_grad()
def after_blocks(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Tensor:
    """What the model makes of the last block's output before its head: the final norm.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
    batch : Batch
        Behind the last block.

    Returns
    -------
    Tensor of shape (batch, length, hidden)
        The last of the ``hidden_states`` that transformers reports.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(batch.hidden.shape[:2], dtype=torch.int64, device=device)
    blocks = blocks_of(model, anatomy)
    with passing_through(blocks, anatomy.extra_outputs, [], [], batch.hidden.to(device)):
        output = _backbone(model)(input_ids=ids, use_cache=False)
    states: Tensor = output[0]
    return states.cpu()


@torch.no_grad()
def record_calls(
    model: nn.Module, anatomy: Anatomy, ids: Tensor
) -> tuple[Tensor, tuple[Call, ...]]:
    """Hidden states in front of the first block, and what each block is called with beside them.

    Parameters
    ----------
    model : nn.Module
    anatomy : Anatomy
    ids : Tensor of shape (batch, length)

    Returns
    -------
    hidden : Tensor of shape (batch, length, hidden)
        On the CPU.
    calls : tuple of Call
    """
    calls: list[Call] = []
    hidden: list[Tensor] = []
    device = next(model.parameters()).device
    with passing_through(blocks_of(model, anatomy), anatomy.extra_outputs, hidden, calls):
        _backbone(model)(input_ids=ids.to(device), use_cache=False)
    return hidden[0].cpu(), tuple(calls)


@contextmanager
def passing_through(
    blocks: Sequence[nn.Module],
    extra_outputs: int | None,
    hidden: list[Tensor],
    calls: list[Call],
    instead: Tensor | None = None,
) -> Iterator[None]:
    """Let every block return its input, or what is given, and write down how it was called."""

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        if args:
            states, args = args[0], args[1:]
        elif "hidden_states" in kwargs:
            states = kwargs.pop("hidden_states")
        else:
            raise ModelError(f"a block was called without hidden states, with {sorted(kwargs)}")
        hidden.append(states)
        calls.append((args, kwargs))
        states = states if instead is None else instead
        return states if extra_outputs is None else (states, *[None] * extra_outputs)

    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = pass_through
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:  # accelerate sets one to move a block between devices
                block.forward = forward


@torch.no_grad()
def check_replay(model: nn.Module, anatomy: Anatomy, ids: Tensor) -> None:
    """Compare the last block's output of the real model with that of the replay.

    Raises
    ------
    ModelError
        If they differ: more than hidden states flows from block to block.
    """
    blocks = blocks_of(model, anatomy)
    seen: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        _backbone(model)(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    batch = Batch(*record_calls(model, anatomy, ids))
    if len(batch.calls) == len(blocks) and seen:
        expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        for index, block in enumerate(blocks):
            batch = run_block(block, index, batch)
        if torch.allclose(
            batch.hidden.float(), expected.float().cpu(), rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            return
    raise ModelError(
        f"{type(model).__name__} passes more than hidden states from block to block, or does not "
        "run each block once; it cannot be calibrated block by block"
    )


def blocks_of(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """Blocks of a model, in order."""
    return list(model.get_submodule(anatomy.path).children())


def _backbone(model: nn.Module) -> nn.Module:
    backbone = getattr(model, "base_model", model)
    assert isinstance(backbone, nn.Module)
    return backbone


def equal_calls(left: Any, right: Any) -> bool:
    """Compare nested arguments of blocks, tensors by value."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and torch.equal(left, right))
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(equal_calls, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal_calls(left[k], right[k]) for k in left)
    return left is right or (type(left) is type(right) and bool(left == right))
