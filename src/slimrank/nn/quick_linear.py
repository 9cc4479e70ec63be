"""A linear without the way through its module, where that way adds nothing."""

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from slimrank.nn.product import apply_weight, is_recorded


def bare_weight(linear: nn.Module) -> Tensor | None:
    """Weight of a linear whose call is one product and nothing else; None of any other.

    For one token the way through a module costs as much as a small product. It is left out where
    nobody could tell: an ``nn.Linear`` itself, without bias, hooks or a forward of its own, while
    no hooks for all modules are set and nothing is compiled or traced. What PEFT, quantisers and
    offloading put there is called as ever.

    Examples
    --------
    >>> linear = nn.Linear(3, 2, bias=False)
    >>> bare_weight(linear) is linear.weight
    True
    >>> handle = linear.register_forward_hook(print)
    >>> bare_weight(linear) is None, bare_weight(nn.Linear(3, 2)) is None
    (True, True)
    """
    if type(linear) is not nn.Linear or is_recorded():
        return None
    state = linear.__dict__
    parameters = state["_parameters"]
    has_more = (
        parameters.get("bias") is not None
        or state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or "forward" in state
        or linear._compiled_call_impl is not None
        or _modules._has_any_global_hook()  # type: ignore[no-untyped-call]
    )
    weight: Tensor | None = parameters.get("weight")
    return None if has_more else weight


def call_linear(linear: nn.Module, inputs: Tensor, is_between: bool = False) -> Tensor:
    """What ``linear(inputs)`` gives, without the way through the module where it can be spared.

    `is_between` is that of `slimrank.nn.product.apply_weight`.
    """
    weight = bare_weight(linear)
    if weight is not None:
        return apply_weight(inputs, weight, is_between)
    outputs: Tensor = linear(inputs)
    return outputs
