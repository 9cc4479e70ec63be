"""Rows in int8: the dense model with int8 weights, by torchao, and models with int8 factors."""

from collections.abc import Sequence
from typing import Any

from slimrank.checkpoint import folder_bytes
from slimrank.errors import RecipeError, extra_needed
from slimrank.evaluation import quiet
from slimrank.nn import LowRankLinear, round_factors

LOGGERS = ("torchao", "torch.utils._pytree")


def require_int8() -> None:
    """See that torchao is installed, before any work.

    Raises
    ------
    SlimrankError
        If it is not.
    """
    with extra_needed("the int8 baseline needs torchao", "quant"), quiet(*LOGGERS):
        import torchao.quantization  # noqa: F401


def quantize_linears(model: Any, names: Sequence[str]) -> tuple[int, int]:
    """Put linears into int8 in place, weights only, one scale for each output.

    Parameters
    ----------
    model : PreTrainedModel
        Dense.
    names : sequence of str
        Of its linears.

    Returns
    -------
    total, linears : int
        Bytes of the weight files with these linears as int8 codes and scales, and of these linears
        in them.
    """
    require_int8()
    with quiet(*LOGGERS):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        before = sum(_bytes(model.get_submodule(name).weight) for name in names)
        total = folder_bytes(model)
        wanted = set(names)
        config = Int8WeightOnlyConfig(set_inductor_config=False)
        quantize_(model, config, filter_fn=lambda _module, name: name in wanted)
    weights = [model.get_submodule(name).weight for name in names]
    after = sum(_bytes(weight.qdata) + _bytes(weight.scale) for weight in weights)
    return total - before + after, after


def round_low_rank(model: Any) -> None:
    """Put all factors of a model into int8 in place, as `slimrank.quantize` does by default.

    Linears that stayed dense are left as they are.

    Raises
    ------
    RecipeError
        If there are no factors.
    NumericalError
        As `slimrank.linalg.round_rows`.
    """
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    if not layers:
        raise RecipeError(
            "no linear was factorised, so there are no factors to put into int8; keep less, or "
            "leave int8_factors out"
        )
    for layer in layers:
        round_factors(layer)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
