"""One attention run alone, as far as its update of the key/value cache."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slimrank.errors import ModelError
from slimrank.model.cache_calls import CacheCall, SpyCache, replaced_forward
from slimrank.nn import LowRankLinear

UNIT = 2.0**-16  # of row numbers: exact, and small enough for what clips keys


@dataclass(frozen=True, slots=True)
class Handover:
    """What an attention gave to the cache, and what its linears had answered.

    Parameters
    ----------
    keys, values : Tensor of shape (1, heads, TOKENS, features)
        With their graphs.
    answers : tuple of (str, Tensor)
        Names of linears in call order, each with what it gave: leaves of the graphs.
    """

    keys: Tensor
    values: Tensor
    answers: tuple[tuple[str, Tensor], ...]


class _Reached(Exception):
    """Keys and values are there: no need to go on."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


def hand_over(
    model: nn.Module, call: CacheCall, linears: Mapping[str, nn.Linear | LowRankLinear]
) -> Handover:
    """Run one attention alone, on the CPU and in float32, until it hands over keys and values.

    Each linear answers with its row numbers times `UNIT`, for the second token in reverse; all
    other parameters are ones, and positions are such that a rotation changes nothing. So it does
    not matter where the weights are, nor whether there are any.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    call : CacheCall
        How the model calls the attention.
    linears : mapping of str to linear
        The topmost linears in it, by full name; their own forwards do not run.

    Raises
    ------
    ModelError
        If it cannot be run by itself, or then updates no cache.
    """
    module = model.get_submodule(call.name)
    answers: list[tuple[str, Tensor]] = []

    def stop(keys: Tensor, values: Tensor, _layer: int) -> NoReturn:
        raise _Reached(keys, values)

    inner = tuple(f"{name.removeprefix(f'{call.name}.')}." for name in linears)
    others = {
        name: tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if not name.startswith(inner)
    }
    with ExitStack() as undo:
        for context in (torch.device("cpu"), torch.inference_mode(False), torch.enable_grad()):
            undo.enter_context(context)
        for child in module.modules():
            undo.enter_context(replaced_forward(child, MethodType(type(child).forward, child)))
        for name, linear in linears.items():
            answer = _answering(name, linear.out_features, answers)
            undo.enter_context(replaced_forward(linear, answer))
        args, kwargs = _blank((call.args, dict(call.kwargs)), SpyCache(model.config, stop))
        ones = {name: torch.ones(t.shape, dtype=_plain(t)) for name, t in others.items()}
        try:
            functional_call(module, ones, args, kwargs)
        except _Reached as reached:
            return Handover(reached.keys, reached.values, tuple(answers))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(f"{call.name} cannot be run by itself: {error}") from error
    raise ModelError(f"{call.name} writes no keys and values when it is run by itself")


def _answering(name: str, rows: int, answers: list[tuple[str, Tensor]]) -> Callable[..., Tensor]:
    """Make a forward that gives row numbers, and writes down what it gave."""

    def forward(inputs: Tensor) -> Tensor:
        numbers = UNIT * torch.arange(rows, dtype=torch.float32)
        both = torch.stack([numbers, numbers.flip(0)])
        answer = both.expand(*inputs.shape[:-1], rows).clone().requires_grad_()
        answers.append((name, answer))
        return answer.clone()  # some models clip in place

    return forward


def _blank(value: Any, cache: SpyCache) -> Any:
    """Turn recorded arguments into zeros on the CPU, and cosine and sine into those of angle 0."""
    if isinstance(value, SpyCache):
        return cache
    if isinstance(value, Tensor):
        if value.is_complex():
            return torch.ones(value.shape, dtype=value.dtype)
        return torch.zeros(value.shape, dtype=_plain(value))
    if isinstance(value, dict):
        return {key: _blank(item, cache) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        if _is_rotation(value):
            cosine, sine = (_blank(item, cache) for item in value)
            return type(value)([cosine + 1, sine])
        return type(value)([_blank(item, cache) for item in value])
    return value


def _plain(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _is_rotation(value: Sequence[Any]) -> bool:
    """Tell cosine and sine: two tensors of floats of one shape."""
    return (
        len(value) == 2
        and all(isinstance(item, Tensor) and item.is_floating_point() for item in value)
        and value[0].shape == value[1].shape
    )
