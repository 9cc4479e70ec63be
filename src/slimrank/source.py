"""Where a dense model comes from: a folder, a hub id, or a GGUF file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slimrank.checkpoint import (
    LOAD_ERRORS,
    QUANT_METHOD,
    TRUSTED,
    load_mapped,
    own_weight_files,
    read_headers,
    reason,
    require_sound,
    require_sound_config,
    told_as,
)
from slimrank.errors import CheckpointError, ModelError, NumericalError, TextError
from slimrank.model import let_go_of
from slimrank.nn import LowRankLinear

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # tokenizers included


@dataclass(frozen=True, slots=True)
class Source:
    """A name that a user gave, told apart.

    Parameters
    ----------
    name : str
        As given.
    location : str
        What transformers takes first.
    options : dict
        What else it takes: the GGUF file, if it is one.
    """

    name: str
    location: str
    options: dict[str, Any]

    @property
    def is_gguf(self) -> bool:
        """True if the weights come from a GGUF file; they are dequantised."""
        return "gguf_file" in self.options


def parse_source(name: str | Path) -> Source:
    """Tell a folder, a GGUF file and a hub id apart.

    Raises
    ------
    ModelError
        If it looks like a path and nothing is there.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {name}")
        return Source(str(name), str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json; it is no model folder")
        return Source(str(name), str(path), {})
    if path.exists():
        raise ModelError(f"{name} is a file; give a model folder, a hub id or a .gguf file")
    looks_like_path = path.is_absolute() or str(name).startswith((".", "~"))
    if looks_like_path or len(path.parts) > 2:
        raise ModelError(f"no such model folder: {name}")
    return Source(str(name), str(name), {})


def load_model(source: Source, dtype: str = "auto") -> Any:
    """Load a causal language model in eval mode, and see that all its weights are there and finite.

    Raises
    ------
    ModelError
        If it cannot be loaded, is no causal language model, or lacks weights.
    NumericalError
        If a weight is NaN or infinite.
    """
    options = TRUSTED | source.options
    if source.is_gguf:
        options |= _dequantized()
    with told_as(ModelError, f"cannot load {source.name}"):
        if not source.is_gguf and Path(source.location).is_dir():
            require_sound(Path(source.location))
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, output_loading_info=True, **options
        )
    if source.is_gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    lost = [str(key) for key in info["missing_keys"]]
    if lost:
        raise ModelError(f"{source.name} lacks {len(lost)} weights, such as {sorted(lost)[0]}")
    require_finite_weights(model, source.name)
    return model.eval()


def map_model(source: Source, dtype: str = "auto", device: str | None = None) -> Any:
    """Open a causal language model whose weights stay in their files.

    Raises
    ------
    ModelError
        If it is a GGUF file, or a hub id that is not to be had.
    CheckpointError, NumericalError
        As `slimrank.checkpoint.load_mapped` and `load_model`.
    """
    if source.is_gguf:
        raise ModelError(f"{source.name} is a GGUF file, which cannot be streamed; load it whole")
    folder = Path(source.location)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source.location, allow_patterns=MODEL_FILES))
        except LOAD_ERRORS as error:
            raise ModelError(f"cannot load {source.name}: {reason(error)}") from error
    model = load_mapped(folder, dtype, device)
    require_finite_weights(model, source.name)
    return model


def open_dense(
    model: str | Path | nn.Module,
    dtype: str,
    tokenizer: Any = None,
    stream: bool = False,
    device: str | None = None,
) -> tuple[Any, str, Any]:
    """Take a model in memory, or load one, and see that it is dense and finite.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
    dtype : str
        To load in; a model in memory keeps its own.
    tokenizer : PreTrainedTokenizerBase, optional
        Given back as it is; loaded if the model is.
    stream : bool
        Leave the weights in their files (see `slimrank.checkpoint.load_mapped`).
    device : str, optional
        Where it is to run; where it is if left out.

    Returns
    -------
    model : PreTrainedModel
        In eval mode.
    name : str
    tokenizer : PreTrainedTokenizerBase or None
        None only for a model in memory that came without.

    Raises
    ------
    ModelError, NumericalError, TextError
        See `load_model` and `load_tokenizer`.
    """
    if isinstance(model, nn.Module):
        if stream:
            raise ModelError("a model in memory cannot be streamed; give its folder")
        require_device(device)
        require_dense(model, type(model).__name__)
        require_finite_weights(model, type(model).__name__)
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        return (model.to(device) if device else model).eval(), name, tokenizer
    source = parse_source(model)
    loaded = open_model(source, dtype, device=device, stream=stream)
    require_dense(loaded, source.name)
    return loaded, source.name, tokenizer or load_tokenizer(source)


def require_device(device: str | None) -> None:
    """See that there is a device, before any work.

    Raises
    ------
    ModelError
        If torch cannot use it here.

    Examples
    --------
    >>> require_device("meta")
    Traceback (most recent call last):
    slimrank.errors.ModelError: cannot use device meta: it holds no numbers
    """
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no numbers")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = reason(error).split(". ")[0]
        raise ModelError(f"cannot use device {device}: {why}") from error


def open_model(
    source: Source, dtype: str = "auto", *, device: str | None = None, stream: bool = False
) -> Any:
    """Load a causal language model to a device, or leave its weights in their files.

    Raises
    ------
    ModelError, CheckpointError, NumericalError
        As `require_device`, and `load_model` or `map_model`.
    """
    require_device(device)
    if stream:
        return map_model(source, dtype, device)
    model = load_model(source, dtype)
    return model.to(device) if device else model


def load_skeleton(source: Source, dtype: str = "auto") -> Any:
    """Build the model on the meta device from its configuration alone; no weight is read.

    Raises
    ------
    ModelError
        If there is no configuration, or none of a causal language model.
    """
    headers = _known_headers(source)
    with told_as(ModelError, f"cannot read {source.name}"):
        if not source.is_gguf and Path(source.location).is_dir():
            require_sound_config(Path(source.location), headers)
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=False, **source.options
        )
        _require_unquantised(getattr(config, "quantization_config", None), source.name)
        stored = config.dtype or _stored_dtype(headers)
        wanted = stored if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=False
            ).eval()


def load_tokenizer(source: Source) -> Any:
    """Load the model's tokenizer.

    Raises
    ------
    TextError
        If there is none.
    """
    with told_as(TextError, f"{source.name} has no tokenizer"):
        return AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=False, **source.options
        )


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of a text, shape (tokens,), with what the tokenizer adds at its start.

    Raises
    ------
    TextError
        If the text gives no token.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if ids.numel() == 0:
        raise TextError("the text is empty: it gives no token")
    return ids.to(torch.int64)  # type: ignore[no-any-return]


def require_finite_weights(model: Any, name: str) -> None:
    """Refuse a model with NaN or infinite weights, before any work.

    Raises
    ------
    NumericalError
        With the name of the first bad parameter.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_finite(parameter):
            raise NumericalError(f"{name}: {parameter_name} holds NaN or infinite weights")
        let_go_of((parameter,))


def _is_finite(parameter: torch.Tensor) -> bool:
    """Piece by piece: of an embedding at once it would take twice its memory."""
    pieces = torch.split(parameter.detach().reshape(-1), 2**22)
    return all(bool(torch.isfinite(piece).all()) for piece in pieces)


def require_dense(model: Any, name: str) -> None:
    """Refuse a model that is compressed or quantised already.

    Raises
    ------
    ModelError
    """
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise ModelError(f"{name} is compressed already; start from the dense model")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name} is quantised; compress first, quantise afterwards")


def _known_headers(source: Source) -> dict[str, torch.Tensor]:
    """Headers of the weight files of a folder; none if they are not all there, or damaged."""
    folder = Path(source.location)
    if source.is_gguf or not folder.is_dir():
        return {}
    try:
        return read_headers(own_weight_files(folder))
    except CheckpointError:
        return {}


def _stored_dtype(headers: dict[str, torch.Tensor]) -> torch.dtype:
    """Dtype of weights whose configuration names none; float32 where they are not known."""
    return next((t.dtype for t in headers.values() if t.is_floating_point()), torch.float32)


def _require_unquantised(config: Any, name: str) -> None:
    """Refuse by what the configuration says, before anything is loaded."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method == QUANT_METHOD:
        raise ModelError(f"{name} is compressed already; start from the dense model")
    if method is not None and method != "gguf":
        raise ModelError(f"{name} is quantised ({method}); compress first, quantise afterwards")


def _dequantized() -> dict[str, Any]:
    """Ask for plain floats, where transformers would keep GGUF blocks packed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
