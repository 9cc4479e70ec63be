"""A conversation with a model, word by word."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TextStreamer

from slimrank.errors import TextError

Say = Callable[[str], None]


class Answer(NamedTuple):
    """What a model said, and how many tokens it wrote, the last of which may say that it ends."""

    text: str
    tokens: int


@dataclass(slots=True)
class Conversation:
    """Turns of a user and a model; without a chat template, one text that goes on.

    Parameters
    ----------
    model : PreTrainedModel
        Dense or compressed.
    tokenizer : PreTrainedTokenizerBase
    system : str, optional
        What the model is told first.
    max_new_tokens : int
        Of an answer, at most; fewer where the model has no positions for them.
    temperature : float
        Of sampling; 0 takes the likeliest token each time.
    """

    model: Any
    tokenizer: Any
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    _turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether turns are told apart."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def forget(self) -> None:
        """Begin anew."""
        self._turns.clear()

    def answer(self, text: str, say: Say) -> Answer:
        """Let the model answer, and keep both turns.

        Parameters
        ----------
        text : str
        say : callable
            Called with each piece of the answer as soon as it is there.

        Returns
        -------
        Answer

        Raises
        ------
        TextError
            If nothing is asked, or the conversation has become as long as the model reads; it is as
            it was before then.
        """
        if not text.strip():
            raise TextError("there is nothing to answer")
        turns = [*self._turns, {"role": "user", "content": text}]
        ids = self._ids(turns)
        written = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=_Teller(self.tokenizer, say),
            max_new_tokens=self._room(ids),
            pad_token_id=self._pad(),
            **self._sampling(),
        )
        new = written[0, ids.shape[1] :]
        said = self.tokenizer.decode(new, skip_special_tokens=True)
        self._turns = [*turns, {"role": "assistant", "content": said}]
        return Answer(said, len(new))

    def _ids(self, turns: list[dict[str, str]]) -> Tensor:
        device = next(self.model.parameters()).device
        if self.has_template:
            told = [{"role": "system", "content": self.system}] if self.system else []
            found = self.tokenizer.apply_chat_template(
                [*told, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            text = (self.system or "") + "".join(turn["content"] for turn in turns)
            found = self.tokenizer(text, return_tensors="pt")
        ids: Tensor = found["input_ids"]
        return ids.to(device)

    def _room(self, ids: Tensor) -> int:
        """New tokens that the model has positions for, of those that are allowed."""
        config = self.model.config.get_text_config()
        longest: int | None = getattr(config, "max_position_embeddings", None)
        if longest is None:
            return self.max_new_tokens
        if ids.shape[1] >= longest:
            raise TextError(
                f"the conversation takes {ids.shape[1]} tokens, and the model is made for {longest}"
                "; begin anew"
            )
        return min(self.max_new_tokens, longest - ids.shape[1])

    def _pad(self) -> int | None:
        """What fills up, where nothing is: any token will do."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad  # type: ignore[no-any-return]

    def _sampling(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature}


class _Teller(TextStreamer):  # type: ignore[misc]
    """Gives each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        del stream_end
        if text:
            self._say(text)
