"""The hook by which transformers loads a compressed folder: modules are swapped on the meta device.

No dense weight of a factorised linear is ever allocated. Headers of the weight files are held
against the skeleton before anything is read, since transformers itself fills a missing tensor with
random numbers and goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig
from slimrank.checkpoint.remote_code import forget_remote_code
from slimrank.checkpoint.size import as_saved, read_headers
from slimrank.errors import CheckpointError, ModelError
from slimrank.model import replace_linear
from slimrank.nn import (
    Int8Factor,
    Int8Linear,
    LowRankLinear,
    RemappedFactors,
    SplitLinear,
    attach_latent_cache,
    check_pivots,
    check_scale,
    detach_latent_cache,
    empty_int8_factors,
    empty_remapped_factors,
    has_int8_factors,
    packed_factors,
)

FACTOR_KEYS = (
    *(".latent.weight", ".expand.weight", ".pivots", ".latent.codes", ".expand.codes"),
    *(".remapped.packed", ".remapped.latent_scale", ".remapped.expand_scale"),
)
CODES = (torch.int8, torch.int16)


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps `LowRankLinear` in for the linears that a `LowRankConfig` lists."""

    requires_calibration = True

    def is_serializable(self, **_: Any) -> bool:
        """Tell transformers that `save_pretrained` works as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are plain floats, unless they are codes."""
        return not self.quantization_config.int8_linears

    @property
    def is_qat_trainable(self) -> bool:
        """`Trainer` may train them without adapters."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """Two linears in a row."""
        return True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> nn.Module:
        swap_in(model, self.quantization_config)
        if checkpoint_files:
            check_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        # `.half()` and `.float()` refuse models marked as quantised. Ours holds floats, and codes
        # that they leave alone.
        model.is_quantized = False  # type: ignore[assignment]
        forget_remote_code(model.config)
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear) and module.pivoted and not module.pivots.is_meta:
                check_pivots(module.pivots, module.out_features, name)
            if isinstance(module, Int8Factor | Int8Linear) and not module.scale.is_meta:
                check_scale(module.scale, name)
            if isinstance(module, RemappedFactors) and not module.packed.is_meta:
                module.check(name.removesuffix(".remapped"))
        attach(model, self.quantization_config)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        detach_latent_cache(model)
        for kind in (SplitLinear, LowRankLinear, Int8Linear):
            for name, module in list(model.named_modules()):
                if isinstance(module, kind):
                    replace_linear(model, name, module.to_linear())
        if isinstance(dtype, str):  # a configuration that was saved names it
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)


def register() -> None:
    """Make transformers know the format. Safe to call twice."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


def mark_compressed(model: Any, attentions: Mapping[str, tuple[str, str]] | None = None) -> None:
    """Give a model in memory the configuration that `save_pretrained` writes for its factors.

    Parameters
    ----------
    model : PreTrainedModel
    attentions : mapping of str to (str, str), optional
        Attentions whose cache is to hold latents, and the linears of their keys and values; the
        cache is attached.
    """
    modules = dict(model.named_modules())
    linears = {
        name: {"rank": module.rank, "pivoted": module.pivoted} | _storage(module)
        for name, module in modules.items()
        if isinstance(module, LowRankLinear)
    }
    splits = {
        name: {"keys": module.key_ranges, "values": module.value_ranges}
        for name, module in modules.items()
        if isinstance(module, SplitLinear)
    }
    rounded = {name: {"bits": 8} for name, m in modules.items() if isinstance(m, Int8Linear)}
    if not linears and not splits and not rounded:
        return
    latents = {n: {"keys": k, "values": v} for n, (k, v) in (attentions or {}).items()}
    config = LowRankConfig(linears=linears, splits=splits, kv_cache=latents, rounded=rounded)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)
    attach(model, config)


def _storage(layer: LowRankLinear) -> dict[str, Any]:
    """Say what the factors of a layer are stored as, where they are not floats."""
    packed = packed_factors(layer)
    if packed is not None:
        dtype = str(packed.stored).removeprefix("torch.")
        sides = {"out_features": layer.out_features, "in_features": layer.in_features}
        return {"remapped": {"dtype": dtype, **sides}}
    return {"bits": 8} if has_int8_factors(layer) else {}


def attach(model: nn.Module, config: LowRankConfig) -> None:
    """Let the model's cache hold latents where the configuration says so."""
    if config.kv_cache:
        names = {
            _known(model, name): (_known(model, entry.keys), _known(model, entry.values))
            for name, entry in config.kv_cache.items()
        }
        attach_latent_cache(model, names)


def swap_in(model: nn.Module, config: LowRankConfig) -> None:
    """Split the listed projections and empty the listed linears, all on the meta device.

    Raises
    ------
    CheckpointError
        If a name is no linear of the model, a rank is larger than the linear, or the sides that
        packed factors are said to have are not those of the linear.
    """
    for listed, split in config.splits.items():
        name, linear = _listed(model, listed)
        try:
            replacement = SplitLinear(
                linear.in_features,
                linear.out_features,
                split.keys,
                split.values,
                bias=linear.bias is not None,
                device="meta",
                dtype=linear.weight.dtype,
            )
        except ModelError as error:
            raise CheckpointError(f"config.json splits {listed}: {error}") from error
        replace_linear(model, name, replacement)
    for listed, entry in config.linears.items():
        name, linear = _listed(model, listed)
        most = min(linear.in_features, linear.out_features)
        if entry.rank > most:
            raise CheckpointError(f"config.json gives {listed} rank {entry.rank}, over {most}")
        layer = LowRankLinear.unfilled(linear, entry.rank, "meta", entry.pivoted)
        if entry.bits is not None:
            empty_int8_factors(layer)
        if entry.remapped is not None:
            sides = entry.remapped.out_features, entry.remapped.in_features
            if sides != (linear.out_features, linear.in_features):
                raise CheckpointError(
                    f"config.json says that {listed} is {sides[0]} by {sides[1]}, "
                    f"the model that it is {linear.out_features} by {linear.in_features}"
                )
            empty_remapped_factors(layer, getattr(torch, entry.remapped.dtype))
        replace_linear(model, name, layer)
    for listed in config.rounded:
        name, linear = _listed(model, listed)
        sides = linear.in_features, linear.out_features
        dtype = linear.weight.dtype
        int8 = Int8Linear(*sides, bias=linear.bias is not None, device="meta", dtype=dtype)
        replace_linear(model, name, int8.train(linear.training))


def _known(model: nn.Module, listed: str) -> str:
    """Name in this model of a module that is listed under its full name.

    A bare backbone, without its head, has the same modules without the prefix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if _submodule(model, listed) is None and listed.startswith(prefix):
        return listed.removeprefix(prefix)
    return listed


def _listed(model: nn.Module, listed: str) -> tuple[str, nn.Linear]:
    name = _known(model, listed)
    linear = _submodule(model, name)
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"config.json lists {listed}, which is no linear of the model")
    return name, linear


def check_files(model: nn.Module, files: Sequence[str]) -> None:
    """Hold the headers of the weight files against the model.

    Raises
    ------
    CheckpointError
        If a file is unreadable, a tensor has another shape, or a factor is missing or not expected.
    """
    headers = read_headers(files)
    shapes = {name: tuple(t.shape) for name, t in headers.items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (LowRankLinear, SplitLinear, Int8Linear))
        for key, tensor in module.state_dict().items()
    }
    if not wanted.keys() <= shapes.keys():
        wanted = as_saved(model, wanted)
    expected: set[str] = set()
    for name, tensor in wanted.items():
        full = name if name in shapes else f"{prefix}{name}"
        if full not in shapes:
            raise CheckpointError(f"the weight files lack {name}")
        if shapes[full] != tuple(tensor.shape):
            raise CheckpointError(
                f"{full} has shape {shapes[full]}, config.json says {tuple(tensor.shape)}"
            )
        if tensor.dtype in CODES and headers[full].dtype != tensor.dtype:
            raise CheckpointError(f"{full} is {headers[full].dtype}, not {tensor.dtype}")
        expected.add(full)
    factors = {k for k in shapes if k.endswith(FACTOR_KEYS)}
    if factors - expected:
        raise CheckpointError(
            f"the weight files hold factors that config.json does not list: "
            f"{sorted(factors - expected)[0]}"
        )
    for name, tensor in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} has shape {shapes[name]}, config.json says {tuple(tensor.shape)}"
            )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
