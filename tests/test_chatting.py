"""Turns reach the model as its template has them, and only those that were answered stay."""

import copy

import pytest
import torch

from slimrank.chatting import Conversation
from slimrank.errors import TextError

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def with_template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def fed(monkeypatch):
    """What `generate` is called with, as text."""
    return []


def watched(model, tokenizer, fed):
    generate = model.generate

    def watch(ids, **settings):
        fed.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        return generate(ids, **settings)

    model.generate = watch
    return model


def joined(text: str) -> str:
    return text.replace(" ", "")


def test_turns_follow_the_template(make_model, with_template, fed):
    model = watched(make_model("llama"), with_template, fed)
    talk = Conversation(model, with_template, system="be kind", max_new_tokens=4)
    first = talk.answer("hello", lambda _piece: None)
    talk.answer("again", lambda _piece: None)
    talk.forget()
    talk.answer("new", lambda _piece: None)
    assert joined(fed[0]) == joined("s: be kind\nu: hello\na: ")
    assert joined(fed[1]) == joined(f"s: be kind\nu: hello\na: {first.text}\nu: again\na: ")
    assert joined(fed[2]) == joined("s: be kind\nu: new\na: ")


def test_without_a_template_the_text_goes_on(make_model, tiny_tokenizer, fed):
    model = watched(make_model("llama"), tiny_tokenizer, fed)
    talk = Conversation(model, tiny_tokenizer, max_new_tokens=4)
    assert not talk.has_template
    first = talk.answer("hello", lambda _piece: None)
    talk.answer("again", lambda _piece: None)
    assert joined(fed[1]) == joined(f"hello{first.text}again")


def test_the_answer_is_what_greedy_search_gives_and_is_told_as_it_comes(make_model, with_template):
    model = make_model("llama")
    model.generation_config.temperature = 0.3  # of the folder; it is not sampled by
    talk = Conversation(model, with_template, max_new_tokens=12)
    pieces: list[str] = []
    answer = talk.answer("hello", pieces.append)
    tokens = with_template("u: hello\na: ", return_tensors="pt", add_special_tokens=False)
    ids = tokens["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer.text == with_template.decode(expected, skip_special_tokens=True)
    assert answer.tokens == len(expected)
    assert len(pieces) > 1
    assert "".join(pieces) == answer.text


def test_a_temperature_samples(make_model, with_template):
    model = make_model("llama")
    talk = Conversation(model, with_template, max_new_tokens=16, temperature=50.0)
    with torch.random.fork_rng():
        found = set()
        for _ in range(4):
            found.add(talk.answer("hello", lambda _piece: None).text)
            talk.forget()
    assert len(found) > 1


def test_a_turn_that_fails_is_not_kept(make_model, with_template, fed):
    model = watched(make_model("llama"), with_template, fed)
    talk = Conversation(model, with_template, max_new_tokens=20)
    with pytest.raises(TextError, match=r"takes \d+ tokens, and the model is made for 128"):
        talk.answer("x" * 130, lambda _piece: None)
    with pytest.raises(TextError, match="nothing to answer"):
        talk.answer("  ", lambda _piece: None)
    talk.answer("y", lambda _piece: None)
    assert joined(fed[0]) == joined("u: y\na: ")


def test_an_answer_ends_where_positions_do(make_model, with_template):
    model = make_model("llama")
    talk = Conversation(model, with_template, max_new_tokens=50)
    model.generation_config.eos_token_id = None
    assert talk.answer("x" * 115, lambda _piece: None).tokens < 20
