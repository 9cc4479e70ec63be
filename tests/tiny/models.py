"""Tiny models of many families, made on the spot with seeded weights, and a tokenizer for them."""

import string
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = 0, 1, 2, 3
CHARACTERS = string.ascii_letters + string.digits + " \n.,;:'\"()-!?%&/–’"
VOCABULARY = 96
WINDOW = 16  # of sliding attention

IDS = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "vocab_size": VOCABULARY,
}
COMMON = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "mistral": ("MistralConfig", {**COMMON, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen2_tied": ("Qwen2Config", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **COMMON,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", COMMON),
    "opt": (
        "OPTConfig",
        {
            **IDS,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "falcon": (
        "FalconConfig",
        {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mixtral": ("MixtralConfig", {**COMMON, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **COMMON,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 16,
        },
    ),
    "gpt2": ("GPT2Config", {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
REFUSED = ("gpt2",)
FAMILIES = tuple(name for name in CONFIGS if name not in REFUSED)
FUSED = ("mixtral", "qwen3_moe")
TIED = ("qwen2_tied", "gemma2", "gemma3", "opt", "falcon")


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Make a model; the same arguments give the same bits."""
    kind, values = CONFIGS[family]
    config = getattr(transformers, kind)(**{**values, **overrides})
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, seed)
    return model.eval()


def build_skeleton(family: str, **overrides: Any) -> Any:
    """Make it on the meta device, with its ties."""
    kind, values = CONFIGS[family]
    config = getattr(transformers, kind)(**{**values, **overrides})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters: matrices of unit gain, norms and biases near what they start from."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)


class ListedExperts(nn.Module):
    """A mixture of experts that are linears in a list; each token goes to the best `top` of them.

    `closed` experts get no token.
    """

    def __init__(self, hidden: int, width: int, experts: int, top: int, closed: tuple[int, ...]):
        super().__init__()
        self.top, self.closed = top, list(closed)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(hidden, width, bias=False),
                    "up_proj": nn.Linear(hidden, width, bias=False),
                    "down_proj": nn.Linear(width, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, states: Tensor) -> Tensor:
        tokens = states.reshape(-1, states.shape[-1])
        scores = self.gate(tokens).index_fill(1, torch.tensor(self.closed, dtype=torch.long), -1e9)
        weights, chosen = scores.topk(self.top, dim=-1)
        weights = weights.softmax(-1)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == number)
            if len(rows) == 0:
                continue
            inputs = tokens[rows]
            inner = torch.sigmoid(expert["gate_proj"](inputs)) * expert["up_proj"](inputs)
            total = total.index_add(
                0, rows, expert["down_proj"](inner) * weights[rows, slots, None]
            )
        return total.reshape(states.shape)


def build_listed_experts(
    experts: int = 4, top: int = 2, closed: tuple[int, ...] = (), width: int = 24
) -> Any:
    """Make a Llama whose MLPs are `ListedExperts`."""
    model = build("llama")
    with torch.random.fork_rng():
        for block in model.model.layers:
            block.mlp = ListedExperts(model.config.hidden_size, width, experts, top, closed)
    fill(model)
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and one in front."""
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK}
    vocabulary |= {c: len(vocabulary) + i for i, c in enumerate(CHARACTERS)}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
