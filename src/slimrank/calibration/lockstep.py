"""One block and its compressed twin, on the same tokens: what arrives at each of their linears.

The original block takes its stream once, and all inputs of its linears are kept. The compressed
one goes from group to group in call order: each pass stops in front of the next linears that are
not solved yet, so every moment includes what was replaced before. A child of the block whose
linears are all solved runs once more at most; its outputs are kept and given again. Together that
is less than three forwards a stream; the authors' code takes ten.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimrank.calibration.store import stacked
from slimrank.calibration.streams import ORIGINAL, SHIFTED, Streams
from slimrank.errors import ModelError, NumericalError
from slimrank.linalg import DriftAccumulator, MomentAccumulator, Moments
from slimrank.model import InputGroup
from slimrank.report import BlockError

TARGET, INPUT, ARRIVED, FINISHED, NEXT = "target", "input", "arrived", "finished", "next"


class _StopForward(Exception):
    """All inputs that a pass is for have been seen."""


@dataclass(frozen=True, slots=True)
class BlockPair:
    """A block that stays as it is, and the one that is being compressed.

    Parameters
    ----------
    index : int
    path : str
        Dotted name of the block in the model.
    original, compressed : nn.Module
    """

    index: int
    path: str
    original: nn.Module
    compressed: nn.Module

    def local(self, name: str) -> str:
        """Name of a linear within the block."""
        return name.removeprefix(f"{self.path}.")


class GroupSums:
    """Moments of one group, over all tokens and over those of the last calibration sequence.

    Parameters
    ----------
    group : InputGroup
    needs : frozenset of str
        As `slimrank.methods.Method.needs`.
    device : torch.device
    """

    def __init__(self, group: InputGroup, needs: frozenset[str], device: torch.device) -> None:
        self.group = group
        self._needs = needs
        width = group.in_features
        self._moments = [MomentAccumulator(width, device) for _ in range(2)]
        self._drifts = [DriftAccumulator(width, device) for _ in range(2)]

    def add(self, original: Tensor | None, shifted: Tensor | None, is_last: bool) -> None:
        """Add tokens of the streams that are looked at.

        Raises
        ------
        NumericalError
            If an activation is not finite, with the linear's name.
        """
        arriving = original if shifted is None else shifted
        assert arriving is not None
        try:
            self._moments[is_last].update(arriving)
            if original is not None and shifted is not None:
                self._drifts[is_last].update(original, shifted)
        except NumericalError as error:
            raise NumericalError(f"the inputs of {self.group.sites[0].name}: {error}") from error

    def results(self) -> tuple[Moments, Moments]:
        """Over all tokens, and over the last sequence."""
        last = self._result(1)
        self._moments[0].merge(self._moments[1])
        self._drifts[0].merge(self._drifts[1])
        return self._result(0), last

    def _result(self, which: int) -> Moments:
        found = self._moments[which].result()
        if "shifted" not in self._needs:
            return found
        drift = self._drifts[which].result()
        return Moments(original=None, tokens=found.tokens, shifted=found.original, drift=drift)


@dataclass(slots=True)
class OriginalPass:
    """What the original block showed.

    Parameters
    ----------
    sums : dict of str to GroupSums
        By the group's first linear; for methods that look at the original stream only.
    energies : dict of str to float
        Mean of ``‖W x‖²`` for each linear; for methods that look at both.
    """

    sums: dict[str, GroupSums] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def pass_original(
    pair: BlockPair, groups: Sequence[InputGroup], needs: frozenset[str], streams: Streams
) -> OriginalPass:
    """Take the original stream through the original block, once.

    Its outputs are kept under ``("target", number)``; with `needs` of both streams, or for the last
    calibration sequence, so are the inputs of each group.

    Parameters
    ----------
    pair : BlockPair
    groups : sequence of InputGroup
    needs : frozenset of str
    streams : Streams

    Raises
    ------
    NumericalError
        If an activation is not finite.
    ModelError
        If `needs` is of both streams and the inputs of a linear are not one a token (experts):
        those of one stream cannot be told from the other's.
    """
    device = next(pair.original.parameters()).device
    found = OriginalPass()
    outputs: dict[str, _Energy] = {}
    if needs == {"original"}:
        found.sums = {g.sites[0].name: GroupSums(g, needs, device) for g in groups}
    if needs == {"original", "shifted"}:
        outputs = {
            s.name: _Energy(pair.original, pair.local(s.name)) for g in groups for s in g.sites
        }
    last = streams.num_calibration - 1
    for numbers in streams.walk():
        is_last = numbers == [last]
        takers: dict[str, Callable[[Tensor], None]] = {}
        for group in groups if numbers[0] <= last and "original" in needs else ():
            name = group.sites[0].name
            takers[pair.local(name)] = _original_taker(
                name, needs, found.sums.get(name), streams, numbers, is_last
            )
        with _before(pair.original, takers), ExitStack() as stack:
            for energy in outputs.values() if numbers[0] <= last else ():
                stack.enter_context(energy.listening())
            hidden = _run(pair.original, pair.index, streams, ORIGINAL, numbers)
        for number, states in zip(numbers, hidden, strict=True):
            streams.store.put((TARGET, number), states)
    found.energies = {name: energy.mean for name, energy in outputs.items()}
    return found


@torch.no_grad()
def pass_level(
    pair: BlockPair,
    level: Sequence[InputGroup],
    solved: Sequence[str],
    pending: Sequence[str],
    needs: frozenset[str],
    streams: Streams,
) -> dict[str, GroupSums]:
    """Take the shifted stream up to the linears of one level, and sum their moments.

    Parameters
    ----------
    pair : BlockPair
    level : sequence of InputGroup
        Groups that do not depend on one another.
    solved, pending : sequence of str
        Linears of the block that are replaced already, and those that are to be.
    needs : frozenset of str
    streams : Streams

    Returns
    -------
    dict of str to GroupSums
        By the group's first linear.
    """
    device = next(pair.compressed.parameters()).device
    sums = {g.sites[0].name: GroupSums(g, needs, device) for g in level}
    last = streams.num_calibration - 1
    finished = _finished_children(pair, solved, pending)
    for numbers in streams.walk():
        if numbers[0] > last:
            continue
        seen: set[str] = set()
        takers = {
            pair.local(name): _shifted_taker(
                name, needs, total, streams, numbers, numbers == [last], seen, len(sums)
            )
            for name, total in sums.items()
        }
        with _before(pair.compressed, takers), _given_again(finished, streams, numbers, seen):
            try:
                _run(pair.compressed, pair.index, streams, SHIFTED, numbers)
            except _StopForward:
                continue
    return sums


@torch.no_grad()
def pass_shifted(
    pair: BlockPair, solved: Sequence[str], streams: Streams
) -> tuple[BlockError, BlockError | None]:
    """Take the shifted stream through the compressed block, and hold it against the targets.

    Its outputs are kept under ``("next", number)``.

    Parameters
    ----------
    pair : BlockPair
    solved : sequence of str
        Linears that are replaced; empty if the block has changed since `pass_level`: all of it then
        runs.
    streams : Streams

    Returns
    -------
    calibration : BlockError
    held_out : BlockError or None
        None if no sequence was held out.

    Raises
    ------
    NumericalError
        If a hidden state is not finite.
    """
    sums = [_ErrorSums(), _ErrorSums()]
    finished = _finished_children(pair, solved, ())
    for numbers in streams.walk():
        is_held_out = numbers[0] >= streams.num_calibration
        again = {} if is_held_out else finished
        with _given_again(again, streams, numbers, {""}):
            hidden = _run(pair.compressed, pair.index, streams, SHIFTED, numbers)
        sums[is_held_out].add(stacked(streams.store, (TARGET,), numbers).to(hidden.device), hidden)
        for number, states in zip(numbers, hidden, strict=True):
            streams.store.put((NEXT, number), states)
    for total in sums:
        if not total.is_finite:
            raise NumericalError(f"the outputs of {pair.path} are not finite")
    return sums[0].result(), sums[1].result() if sums[1].tokens else None


def step_forward(streams: Streams) -> None:
    """Make the outputs of a block the inputs of the next, in both streams; drop all else."""
    streams.store.move(TARGET, ORIGINAL)
    streams.store.move(NEXT, SHIFTED)
    for kind in (INPUT, ARRIVED, FINISHED):
        streams.store.drop_kind(kind)


def call_levels(path: str, groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """Groups in call order; those alike but for a number (experts) are one level.

    A linear that the forward of `discover` did not reach is a group of its own, in the level of the
    like linears that were reached.

    Examples
    --------
    >>> call_levels("layers.0", [])
    []
    """
    levels: dict[frozenset[str], list[InputGroup]] = {}
    for group in groups:
        kind = frozenset(
            re.sub(r"\b\d+\b", "*", site.name.removeprefix(path)) for site in group.sites
        )
        home = next((known for known in levels if kind <= known), kind)
        levels.setdefault(home, []).append(group)
    return list(levels.values())


def _run(block: nn.Module, index: int, streams: Streams, stream: str, numbers: list[int]) -> Tensor:
    args, kwargs = streams.call(index, numbers)
    device = next(block.parameters()).device
    output = block(stacked(streams.store, (stream,), numbers).to(device), *args, **kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _original_taker(
    name: str,
    needs: frozenset[str],
    sums: GroupSums | None,
    streams: Streams,
    numbers: list[int],
    is_last: bool,
) -> Callable[[Tensor], None]:
    """What is done with the inputs of a group in the original block."""

    def take(inputs: Tensor) -> None:
        if sums is not None:
            sums.add(inputs, None, is_last)
        if "shifted" in needs:
            paired = _by_sequence(name, inputs, streams, numbers)
            for number, rows in zip(numbers, paired, strict=True):
                streams.store.put((INPUT, name, number), rows)
        elif is_last:
            streams.store.put((INPUT, name, numbers[0]), inputs.reshape(-1, inputs.shape[-1]))

    return take


def _shifted_taker(
    name: str,
    needs: frozenset[str],
    sums: GroupSums,
    streams: Streams,
    numbers: list[int],
    is_last: bool,
    seen: set[str],
    wanted: int,
) -> Callable[[Tensor], None]:
    """What is done with the inputs of a group in the compressed block; the last one stops it."""

    def take(inputs: Tensor) -> None:
        original = None
        if "original" in needs:
            inputs = _by_sequence(name, inputs, streams, numbers)
            original = stacked(streams.store, (INPUT, name), numbers).to(inputs.device)
        sums.add(original, inputs, is_last)
        if is_last:
            rows = inputs.reshape(-1, inputs.shape[-1])
            streams.store.put((ARRIVED, name, numbers[0]), rows)
        seen.add(name)
        if len(seen) == wanted:
            raise _StopForward

    return take


def _by_sequence(name: str, inputs: Tensor, streams: Streams, numbers: list[int]) -> Tensor:
    """Inputs as (sequence, token, feature)."""
    length = streams.lengths[numbers[0]]
    tokens = inputs.shape[:-1].numel()
    if tokens != len(numbers) * length:
        raise ModelError(
            f"{name} receives {tokens} of {len(numbers) * length} tokens (routed?): its inputs in "
            "the two streams cannot be paired; use method shift-aware, or ignore it"
        )
    return inputs.reshape(len(numbers), length, inputs.shape[-1])


@contextmanager
def _before(block: nn.Module, takers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Give the inputs of each named linear to its taker; remove nothing but these hooks."""
    with ExitStack() as stack:
        for name, take in takers.items():

            def hook(
                _m: nn.Module, args: tuple[Any, ...], take: Callable[[Tensor], None] = take
            ) -> None:
                take(args[0])

            handle = block.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def _finished_children(
    pair: BlockPair, solved: Sequence[str], pending: Sequence[str]
) -> dict[str, nn.Module]:
    """Children of the block that hold solved linears, and none to be solved."""
    inside, outside = (
        {pair.local(name).partition(".")[0] for name in names} for names in (solved, pending)
    )
    children = dict(pair.compressed.named_children())
    return {name: child for name, child in children.items() if name in inside - outside}


@contextmanager
def _given_again(
    children: Mapping[str, nn.Module],
    streams: Streams,
    numbers: list[int],
    seen: set[str],
) -> Iterator[None]:
    """Let children that are finished give what they gave before; write it down the first time.

    Nothing is written down once an input of this pass was `seen`: it may depend on what follows.
    """
    store = streams.store
    with ExitStack() as stack:
        for name, child in children.items():
            if all((FINISHED, name, number) in store for number in numbers):
                states = stacked(store, (FINISHED, name), numbers)
                extra = store.get((FINISHED, name, "extra", numbers[0]))
                stack.enter_context(_replaced_forward(child, states, int(extra)))
            elif not seen:

                def hook(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                    first, extra = (
                        (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
                    )
                    rest = output[1:] if extra else ()
                    if seen or len(first) != len(numbers) or any(x is not None for x in rest):
                        return
                    for number, states in zip(numbers, first, strict=True):
                        store.put((FINISHED, name, number), states)
                        store.put((FINISHED, name, "extra", number), torch.tensor(extra))

                stack.callback(child.register_forward_hook(hook).remove)
        yield


@contextmanager
def _replaced_forward(child: nn.Module, states: Tensor, items: int) -> Iterator[None]:
    """Let a module return what is given: a tensor, or a tuple that it begins."""
    device = next(child.parameters()).device

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        given = states.to(device)
        return (given, *[None] * (items - 1)) if items else given

    own = child.__dict__.get("forward")
    child.forward = forward
    try:
        yield
    finally:
        del child.forward
        if own is not None:
            child.forward = own


class _Energy:
    """Mean squared norm of a linear's outputs, its bias left out."""

    def __init__(self, block: nn.Module, name: str) -> None:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        self._linear, self._sum, self._tokens = linear, 0.0, 0

    @property
    def mean(self) -> float:
        return self._sum / max(self._tokens, 1)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count what the linear gives."""

        def hook(_m: nn.Module, _a: Any, output: Tensor) -> None:
            tokens = output.reshape(-1, output.shape[-1])
            tokens = tokens if self._linear.bias is None else tokens - self._linear.bias
            self._sum += float(tokens.float().square().sum(dim=1).double().sum())
            self._tokens += len(tokens)

        handle = self._linear.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@dataclass(slots=True)
class _ErrorSums:
    """Over tokens: squared error, squared norm of what was wanted, and distance of directions."""

    error: float = 0.0
    energy: float = 0.0
    distance: float = 0.0
    tokens: int = 0

    def add(self, wanted: Tensor, given: Tensor) -> None:
        wanted, given = wanted.float(), given.float()
        self.error += float((wanted - given).square().sum(-1).double().sum())
        self.energy += float(wanted.square().sum(-1).double().sum())
        cosines = torch.cosine_similarity(wanted, given, dim=-1)
        self.distance += float((1 - cosines).double().sum())
        self.tokens += wanted.shape[:-1].numel()

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.error, self.energy, self.distance)))

    def result(self) -> BlockError:
        return BlockError(
            relative_error=self.error / (self.energy or 1.0),
            cosine_distance=max(self.distance / max(self.tokens, 1), 0.0),
        )
