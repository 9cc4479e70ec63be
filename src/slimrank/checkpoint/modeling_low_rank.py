"""Loads this folder with plain transformers, where slimrank is not installed.

Some linears of the model are stored as two thin matrices; ``config.json`` lists them under
``quantization_config``. This file builds these linears before transformers reads the weights. It
needs torch and transformers, and is only run if you say so::

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

slimrank wrote it (Apache-2.0), and loads the folder without it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "low_rank"


class LowRankLinear(nn.Module):
    """``expand(latent(x)) + bias``.

    If there are `pivots`, the latents are outputs themselves: of the rows that these name, in their
    order. `expand` gives all other rows, in ascending order.
    """

    pivots: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, linear: nn.Linear, rank: int, pivoted: bool = False, bits: int | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows = self.out_features - rank if pivoted else self.out_features
        like: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype, "bias": False}
        factors: list[Any] = [
            nn.Linear(self.in_features, rank, **like),
            nn.Linear(rank, rows, **like),
        ]
        if bits is not None:
            factors = [Int8Linear(factor, bits) for factor in factors]
        self.latent, self.expand = factors
        pivots = linear.weight.new_empty(rank, dtype=torch.int32) if pivoted else None
        self.register_buffer("pivots", pivots)
        self.register_parameter("bias", linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        latents = self.latent(inputs)
        outputs: Tensor = self.expand(latents)
        if self.pivots is not None:
            rows, rank = self.pivots.long(), len(self.pivots)
            places = rows.new_ones(self.out_features).index_fill(0, rows, 0).cumsum(0) + rank - 1
            places = places.index_copy(0, rows, torch.arange(rank, device=rows.device))
            outputs = torch.cat((latents, outputs), -1).index_select(-1, places)
        return outputs if self.bias is None else outputs + self.bias


class Int8Linear(nn.Module):
    """A linear, or a factor, in eight bits: int8 codes, and a scale for each output."""

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        if bits != 8:
            raise ValueError(f"config.json says {bits} bits; this file knows 8")
        weight = linear.weight
        self.register_buffer("codes", weight.new_empty(weight.shape, dtype=torch.int8))
        self.register_buffer("scale", weight.new_empty(linear.out_features))
        self.register_parameter("bias", linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        weight = self.codes.to(inputs.dtype)
        if inputs.dtype == torch.float16:  # where sums of codes would overflow
            outputs = functional.linear(inputs, weight * self.scale[:, None])
        else:
            outputs = functional.linear(inputs, weight) * self.scale
        return outputs if self.bias is None else outputs + self.bias


class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of ``config.json``; `kv_cache` changes no output, and is kept."""

    def __init__(
        self,
        linears: dict[str, dict[str, Any]],
        rounded: dict[str, dict[str, Any]] | None = None,
        kv_cache: dict[str, Any] | None = None,
        format_version: int = 1,
        quant_method: str = METHOD,
        **others: Any,
    ) -> None:
        if others or format_version not in (1, 2):
            what = ", ".join(others) or f"format version {format_version}"
            raise ValueError(f"{what} in config.json needs slimrank: install and import it")
        self.quant_method, self.format_version = quant_method, format_version
        self.linears, self.rounded, self.kv_cache = linears, rounded or {}, kv_cache or {}


class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the listed linears into the empty model, and looks at what was loaded into them."""

    requires_calibration = True  # what is loaded is factorised already

    def is_serializable(self, **_: Any) -> bool:
        """`save_pretrained` works as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are floats unless they are in eight bits."""
        return bool(self.quantization_config.format_version == 1)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        for kind, entries in ((LowRankLinear, config.linears), (Int8Linear, config.rounded)):
            for name, entry in entries.items():
                linear = model.get_submodule(name)
                if not isinstance(linear, nn.Linear):
                    raise ValueError(f"config.json lists {name}, which is no linear of the model")
                replacement = kind(linear, **entry)
                replacement.register_buffer("weight", linear.weight.new_empty(0))  # as stored
                model.set_submodule(name, replacement)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # so that `.half()` and `.float()` work
        for name, tensor in model.state_dict().items():  # transformers 5.0 does not look
            if tensor.shape != self.shapes[name]:
                raise ValueError(
                    f"{name} is of shape {[*tensor.shape]}, not {[*self.shapes[name]]}"
                )
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear) and module.pivots is not None:
                rows = module.pivots.sort().values
                is_sound = rows.dtype == torch.int32 and bool((rows.diff() > 0).all())
                if not is_sound or rows[0] < 0 or rows[-1] >= module.out_features:
                    raise ValueError(f"{name}.pivots are damaged")
            if isinstance(module, Int8Linear):
                is_sound = module.codes.dtype == torch.int8 and bool((module.scale >= 0).all())
                if not is_sound or module.scale.isinf().any():
                    raise ValueError(f"{name}.codes or {name}.scale are damaged")
        return model


class LowRankForCausalLM:
    """What ``AutoModelForCausalLM`` asks for the model, which is of a class of transformers."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, config: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load the folder, and insist that its tensors are all there, and no others."""
        kind = getattr(transformers, config.architectures[0])
        with _known():
            model, info = kind.from_pretrained(
                *args, config=config, output_loading_info=True, **kwargs
            )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(what):
                names = ", ".join(sorted(map(str, info[what]))[:3])
                raise ValueError(f"the weight files do not fit the model: {what}: {names}")
        model.save_pretrained = partial(_save, model)
        return (model, info) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, *_: Any, **__: Any) -> None:
        """Do nothing: transformers has the class of the model already."""


@contextmanager
def _known() -> Iterator[None]:
    """Let transformers know the format for a while, unless slimrank is imported and has told it."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        yield
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowRankConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = LowRankQuantizer
    try:
        yield
    finally:
        del AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD]


def _save(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Save as ever, and this file with it."""
    file = Path(__file__)
    model.config.auto_map = {"AutoModelForCausalLM": f"{file.stem}.{LowRankForCausalLM.__name__}"}
    Path(save_directory).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, Path(save_directory) / file.name)
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
