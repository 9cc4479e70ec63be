"""Which modules write to the key/value cache, and how the model calls them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slimrank.errors import ModelError

TOKENS = 2  # enough to tell tokens and row numbers apart


@dataclass(frozen=True, slots=True)
class CacheCall:
    """One module that wrote to the cache.

    Parameters
    ----------
    name : str
        Full dotted name of the module whose forward did it.
    layer : int
        The layer of the cache that it named.
    args, kwargs
        What its forward was called with, for `TOKENS` tokens; the cache is a `SpyCache`.
    """

    name: str
    layer: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class SpyCache(DynamicCache):  # type: ignore[misc]
    """An ordinary cache that tells of each update before it makes it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    on_update : callable
        Gets key states, value states and layer.
    """

    def __init__(self, config: Any, on_update: Callable[[Tensor, Tensor, int], None]) -> None:
        super().__init__(config=config)
        self.on_update = on_update

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Tell, then do as `DynamicCache` does."""
        self.on_update(key_states, value_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def cache_calls(model: Any, path: str) -> list[CacheCall]:
    """Run the backbone once on `TOKENS` tokens and see who updates the cache.

    On the meta device a block that looks at values (routing to experts) cannot end; it is taken to
    return the hidden states that it got.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In eval mode; on the meta device too.
    path : str
        The block list.

    Returns
    -------
    list of CacheCall
        In call order.

    Raises
    ------
    ModelError
        If the model takes no such cache, or cannot be followed on the meta device.
    """
    backbone = getattr(model, "base_model", model)
    parameters = inspect.signature(backbone.forward).parameters
    if "past_key_values" not in parameters and not any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    ):
        raise ModelError(f"{type(model).__name__} takes no key/value cache (past_key_values)")
    running: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    calls: list[CacheCall] = []
    failed: list[tuple[nn.Module, Exception]] = []

    def on_update(_keys: Tensor, _values: Tensor, layer: int) -> None:
        name, args, kwargs = running[-1]
        calls.append(CacheCall(name, layer, args, kwargs))

    device = model.get_input_embeddings().weight.device
    ids = torch.arange(TOKENS, device=device)[None]
    with ExitStack() as undo:
        undo.enter_context(_recording(model, running))
        if device.type == "meta":
            for block in model.get_submodule(path).children():
                undo.enter_context(replaced_forward(block, _ending(block, failed)))
        try:
            cache = SpyCache(model.config, on_update)
            backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        except (RuntimeError, NotImplementedError) as error:
            if device.type != "meta":
                raise
            raise _lost(model, error) from error
    writers = {model.get_submodule(call.name) for call in calls}
    kinds = {type(writer) for writer in writers}
    for block, cause in failed:
        silent = (m for m in block.modules() if type(m) in kinds and m not in writers)
        if not writers or any(silent):
            raise _lost(model, cause) from cause
    return calls


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:  # accelerate sets one to move a module between devices
            module.forward = own


@contextmanager
def _recording(
    model: nn.Module, running: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
) -> Iterator[None]:
    """Keep `running` equal to the stack of modules whose forward runs, and their arguments."""

    def push(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append((name, args, kwargs))

    def pop(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(partial(push, name), with_kwargs=True)
            hooks.callback(before.remove)
            after = module.register_forward_hook(pop, always_call=True)
            hooks.callback(after.remove)
        yield


def _ending(block: nn.Module, failed: list[tuple[nn.Module, Exception]]) -> Callable[..., Any]:
    """Make a forward that returns its input where the block's own fails, and writes that down."""
    own = block.forward

    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            failed.append((block, error))
            return args[0] if args else kwargs["hidden_states"]

    return ending


def _lost(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be followed without its weights: {error}")
