"""A model that stays in its files: a folder of safetensors, dense or compressed."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from slimrank.checkpoint.aligned import align_file
from slimrank.checkpoint.config import QUANT_METHOD, LowRankConfig
from slimrank.checkpoint.foreign import told_as
from slimrank.checkpoint.quantizer import LowRankQuantizer, check_files, swap_in
from slimrank.checkpoint.size import as_saved, read_headers, saved_tensors
from slimrank.checkpoint.sound import own_weight_files, require_sound
from slimrank.errors import CheckpointError
from slimrank.model import let_go, map_parameters, run_on, take_turns

LEAST_SHARD, MOST_SHARD = 2**28, 5 * 10**9


def load_mapped(folder: Path, dtype: str = "auto", device: str | torch.device | None = None) -> Any:
    """Open a causal language model whose weights stay in their files (see `slimrank.model.mapped`).

    What a block touches is let go of when another runs. Computes what the model in memory computes.

    Parameters
    ----------
    folder : Path
        Of a dense model, or of one compressed by slimrank with factors of floats.
    dtype : str
        ``"auto"``, or what the weights are stored in.
    device : optional
        Where it runs; blocks come there in turns. On the CPU if left out.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode, without gradients.

    Raises
    ------
    CheckpointError
        If the folder is damaged, or its files are laid out otherwise than the model in memory, or
        in another dtype: then it can only be loaded whole.
    """
    require_sound(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    files = own_weight_files(folder)
    stored = next((t.dtype for t in read_headers(files).values() if t.is_floating_point()), None)
    wanted = (config.dtype or stored) if dtype == "auto" else getattr(torch, dtype)
    with (
        told_as(CheckpointError, f"cannot load {folder}"),
        init_empty_weights(include_buffers=False),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
    if getattr(model, "_keep_in_fp32_modules", None):
        raise _otherwise(folder, "the model keeps some weights in float32")
    low_rank = _low_rank_config(folder, config)
    if low_rank is not None:
        swap_in(model, low_rank)
        check_files(model, [str(file) for file in files])
        model.config.quantization_config = low_rank
        model.hf_quantizer = LowRankQuantizer(low_rank, pre_quantized=True)
    _fill(model, files, folder)
    if low_rank is not None:
        model.hf_quantizer._process_model_after_weight_loading(model)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    take_turns(_parts(model))
    if device is not None:
        run_on(model, _blocks(model), device)
    return model.eval().requires_grad_(False)


def save_mapped(model: Any, folder: Path) -> None:
    """Write a model as `save_pretrained` does, but aligned, and one shard in memory at a time.

    Parameters
    ----------
    model : PreTrainedModel
        Some of its weights are mapped.
    folder : Path
    """
    tensors = {n: t.contiguous() for n, t in as_saved(model, saved_tensors(model)).items()}
    largest = max((_bytes(block.state_dict()) for block in _blocks(model)), default=0)
    shards = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(max(2 * largest, LEAST_SHARD), MOST_SHARD),
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        align_file(folder / file)
        let_go(model)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def map_over(module: nn.Module, file: Path) -> None:
    """Put the tensors of a file in the place of parameters that hold the same numbers.

    Parameters
    ----------
    module : nn.Module
    file : Path
        Written from parameters and buffers of the module, by their names in it.
    """
    parameters = dict(module.named_parameters())
    for name, mapped in map_parameters(file).items():
        if name in parameters:
            _put(module, name, mapped.requires_grad_(parameters[name].requires_grad))


def _fill(model: Any, files: list[Path], folder: Path) -> None:
    """Give every parameter its tensor in the files, and every buffer a copy of its own."""
    state = model.state_dict(keep_vars=True)
    stand_ins = {name: torch.empty_like(t, device="meta") for name, t in state.items()}
    own = {id(tensor): name for name, tensor in stand_ins.items()}  # a tied one by both its names
    names = {saved: own.get(id(tensor)) for saved, tensor in as_saved(model, stand_ins).items()}
    for file in files:
        for saved, mapped in map_parameters(file).items():
            name = names.get(saved)
            if name is None and _is_ignored(model, saved):
                continue
            if name is None:
                raise _otherwise(folder, f"{saved} is no weight of {type(model).__name__}")
            known = state[name]
            if known.shape != mapped.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(mapped.shape)} in {file}, and {tuple(known.shape)} "
                    "by config.json"
                )
            if known.dtype != mapped.dtype:
                raise _otherwise(folder, f"{name} is stored in {mapped.dtype}, not {known.dtype}")
            is_parameter = isinstance(known, nn.Parameter)
            _put(model, name, mapped if is_parameter else mapped.detach().clone())
    unknown = {name for name, t in model.state_dict().items() if t.is_meta}
    model.tie_weights(missing_keys=unknown, recompute_mapping=False)  # as `from_pretrained` does
    lost = sorted(name for name, t in model.state_dict().items() if t.is_meta)
    if lost:
        raise CheckpointError(f"{folder} lacks {len(lost)} weights, such as {lost[0]}")


def _is_ignored(model: Any, saved: str) -> bool:
    """Whether transformers passes over a tensor of the files without a word."""
    patterns = [r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]
    return any(re.search(pattern, saved) for pattern in patterns)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[last] = tensor
    else:
        owner._buffers[last] = tensor


def _parts(model: Any) -> Iterator[nn.Module]:
    """What is worked with one after the other: embedding, blocks, head."""
    yield model.get_input_embeddings()
    yield from _blocks(model)
    head = model.get_output_embeddings()
    if head is not None:
        yield head


def _blocks(model: Any) -> list[nn.Module]:
    """Members of the outermost lists: of all of them, whichever a recipe calls the blocks."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found += module
            inside |= set(module.modules())
    return found


def _low_rank_config(folder: Path, config: Any) -> LowRankConfig | None:
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return None
    values = entry if isinstance(entry, dict) else entry.to_dict()
    if values.get("quant_method") != QUANT_METHOD:
        raise _otherwise(folder, f"it is quantised ({values.get('quant_method')})")
    return LowRankConfig(**values)


def _otherwise(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be streamed: {why}; load it whole, without --stream")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
