"""Several processes that share one run: sums over all of them, and one that writes.

They are those that ``torchrun`` starts, or a group of ``torch.distributed`` that the caller has
joined. Each has the whole model and does every step; what is shared out are sequences (of every N
processes each has one in N) and the solves of a block's linears. Whatever was shared out is added
up or handed round before it counts, so all processes know the same. A single one needs none of
this, and all of it then costs nothing.
"""

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from slimrank.errors import ModelError, ProcessError

T = TypeVar("T")

MEETING = timedelta(minutes=10)
PATIENCE = timedelta(days=7)  # one may solve, or search, for long; a dead one is noticed at once
GROUP = "own"
_GROUPS: dict[str, dist.ProcessGroup] = {}  # what exchanges go by; the default one until `join`
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return number() == 0


def to_be() -> tuple[int, int]:
    """Number and count of processes by what torchrun says, before they have joined.

    Examples
    --------
    >>> to_be()
    (0, 1)
    """
    if count() == 1 and all(name in os.environ for name in OF_TORCHRUN):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return number(), count()


def join() -> None:
    """Join the processes that torchrun has started, until this one ends; or those of the caller.

    All of them must come here. What they exchange goes by gloo, from memory, in a group of its own.

    Raises
    ------
    ProcessError
        If they cannot be reached within minutes.
    """
    if to_be()[1] == 1 or GROUP in _GROUPS:
        return
    with _reaching_all():
        if count() == 1:
            dist.init_process_group("gloo", timeout=MEETING)
            atexit.register(_leave)
        _GROUPS[GROUP] = dist.new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """Device of this process, where one is asked for: of several GPUs each process takes its own.

    Parameters
    ----------
    device : str or None

    Raises
    ------
    ModelError
        If all processes are to be on one GPU.
    """
    if count() == 1 or device in (None, "cpu"):
        return device
    if device != "cuda":
        raise ModelError(f"{count()} processes cannot share {device}; say --device cuda")
    own = int(os.environ.get("LOCAL_RANK", number()))
    return f"cuda:{own % max(torch.cuda.device_count(), 1)}"


def share(items: Sequence[T]) -> list[T]:
    """Own part of what is shared out: one in N.

    Examples
    --------
    >>> share("abc")
    ['a', 'b', 'c']
    """
    return list(items[number() :: count()])


def add_up(tensor: Tensor) -> Tensor:
    """Put the sum over all processes in the place of a tensor, and give it; the same bits to all.

    Raises
    ------
    ProcessError
        If another process has ended. So for all that follow.
    """
    return _reduced(tensor, dist.ReduceOp.SUM)


def sums(*values: float | int) -> list[float]:
    """Sum of each number over all processes.

    Examples
    --------
    >>> sums(1.5, 2)
    [1.5, 2.0]
    """
    return [float(x) for x in add_up(torch.tensor(values, dtype=torch.float64))]


def largest(values: Sequence[float | int]) -> list[float]:
    """Largest of each number over all processes."""
    whole = torch.tensor(values, dtype=torch.float64)
    return [float(x) for x in _reduced(whole, dist.ReduceOp.MAX)]


def gathered(*values: float | int) -> list[list[float]]:
    """The numbers of every process, in order.

    Examples
    --------
    >>> gathered(1.5, 2)
    [[1.5, 2.0]]
    """
    table = torch.zeros(count(), len(values), dtype=torch.float64)
    table[number()] = torch.tensor(values, dtype=torch.float64)
    return [[float(x) for x in row] for row in add_up(table)]


def wait() -> None:
    """Go on once all processes have come here."""
    sums(0)


@contextmanager
def until_all_are_done() -> Iterator[None]:
    """Wait at the end, unless something was raised: what is removed then, others may still read."""
    yield
    wait()


def agreed(says: bool) -> bool:
    """What the first process says: the others may look too late, or too early."""
    return hand_round(str(says))[0] == "True"


def alone(do: Callable[[], object]) -> None:
    """Let the first process do something while the others wait."""
    if is_first():
        do()
    wait()


def require_same(values: Mapping[str, str]) -> None:
    """See that the first process has the same.

    Parameters
    ----------
    values : mapping of str to str
        By what they are called.

    Raises
    ------
    ProcessError
        With the name of what differs.
    """
    firsts = json.loads(hand_round(json.dumps(dict(values)))[0])
    for what, value in values.items():
        if firsts.get(what) != value:
            raise ProcessError(
                f"this process has another {what} than the first one; give all the same"
            )


def hand_round(
    text: str = "", tensors: Mapping[str, Tensor] | None = None, source: int = 0
) -> tuple[str, dict[str, Tensor]]:
    """Give all processes what one of them has; what the others bring is not looked at.

    Parameters
    ----------
    text : str
    tensors : mapping of str to Tensor, optional
        They arrive on the CPU, bit for bit.
    source : int
        Number of the process that has it.

    Examples
    --------
    >>> hand_round("a", {"b": torch.ones(2)})
    ('a', {'b': tensor([1., 1.])})
    """
    known = dict(tensors or {})
    if count() == 1:
        return text, known
    shapes = {name: (str(t.dtype)[len("torch.") :], [*t.shape]) for name, t in known.items()}
    header = json.dumps([text, shapes]).encode()
    size = _from(torch.tensor([len(header)]), source)
    room = torch.empty(int(size), dtype=torch.uint8)
    if number() == source:
        room = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    text, shapes = json.loads(bytes(_from(room, source).tolist()))
    found: dict[str, Tensor] = {}
    for name, (dtype, shape) in shapes.items():
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if number() == source:
            tensor = known[name].detach().cpu().contiguous()
        if tensor.numel():
            _from(tensor.reshape(-1).view(torch.uint8), source)
        found[name] = tensor
    return text, found


def equalise(tensors: Sequence[Tensor]) -> None:
    """Put what the first process has in the place of tensors that are equal but for rounding."""
    for tensor in tensors if count() > 1 else ():
        _, found = hand_round(tensors={"tensor": tensor.data})
        tensor.data.copy_(found["tensor"])


def _from(tensor: Tensor, source: int) -> Tensor:
    with _reaching_all():
        dist.broadcast(tensor, source, _GROUPS.get(GROUP))
    return tensor


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if count() == 1:
        return tensor
    carried = tensor.cpu().contiguous()
    with _reaching_all():
        dist.all_reduce(carried, operation, _GROUPS.get(GROUP))
    return tensor if carried is tensor else tensor.copy_(carried)


@contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        has_ended = "peer" in str(error)  # closed, or reset, by peer
        why = "see its own message" if has_ended else str(error)
        raise ProcessError(f"another process has ended, or cannot be reached: {why}") from error
