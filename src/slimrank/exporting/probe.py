"""What a graph must give: the logits of the model, with a cache, batched and padded on the left."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from slimrank.errors import ModelError
from slimrank.exporting.traced_call import accepted_inputs
from slimrank.targets import num_embeddings

TOKENS, PADDING, STEPS = 9, 3, 4  # of the prompt, of these on the left of the first sequence, after
# of the largest logit; float32 leaves 1e-6 to 1e-5, a wrong mask or position 1e-2 and more
MOST_APART = 1e-3

Step = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Probe:
    """A prompt, tokens that follow it one by one, and what the model makes of them.

    Attributes
    ----------
    tokens : Tensor of shape (2, tokens)
        The prompt, then the most likely token of each step.
    logits : Tensor of shape (2, tokens, vocabulary)
        Of the model at all of them; those of the padding are not compared.
    """

    tokens: Tensor
    logits: Tensor

    @classmethod
    def of(cls, model: Any) -> "Probe":
        """Let a model go on greedily with a prompt.

        Parameters
        ----------
        model : PreTrainedModel
            In float32; its cache is an ordinary one.
        """
        prompt = torch.arange(1, 2 * TOKENS + 1).reshape(2, TOKENS) % num_embeddings(model)
        cache = DynamicCache(config=model.config)
        accepted = accepted_inputs(model)

        def step(inputs: dict[str, Tensor]) -> Tensor:
            known = {name: value for name, value in inputs.items() if name in accepted}
            logits: Tensor = model(**known, past_key_values=cache, use_cache=True).logits
            return logits

        tokens, logits = _walk(step, prompt)
        return cls(tokens, logits)

    def apart(self, step: Step) -> float:
        """How far a runtime's logits are from the model's, as a share of the largest.

        Parameters
        ----------
        step : callable
            Takes ``input_ids``, ``attention_mask`` over all tokens so far and ``position_ids``,
            keeps its cache, and gives logits.
        """
        _, logits = _walk(step, self.tokens[:, :TOKENS], self.tokens)
        seen = _mask(logits.shape[1]).bool()
        difference = (logits.float() - self.logits)[seen].abs().max()
        return float(difference / self.logits[seen].abs().max())

    def require_near(self, step: Step, what: str) -> float:
        """As `apart`, and refuse what is too far.

        Raises
        ------
        ModelError
            If they are further apart than rounding explains, or not finite.
        """
        apart = self.apart(step)
        if not apart <= MOST_APART:
            raise ModelError(
                f"{what} runs, but its logits are {apart:.1e} of the largest from those of the "
                f"model, more than {MOST_APART:.0e}: this architecture is not exported rightly"
            )
        return apart


def _walk(step: Step, prompt: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prompt, then one token at a time: those given, or the most likely ones."""
    tokens, inputs, gathered = prompt, prompt, []
    while True:
        count = tokens.shape[1]
        mask = _mask(count)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        logits = step({"input_ids": inputs, "attention_mask": mask, "position_ids": positions})
        gathered.append(logits)
        if count == TOKENS + STEPS:
            return tokens, torch.cat(gathered, 1)
        inputs = logits[:, -1:].argmax(-1) if given is None else given[:, count : count + 1]
        tokens = torch.cat((tokens, inputs), 1)


def _mask(count: int) -> Tensor:
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[0, :PADDING] = 0
    return mask
