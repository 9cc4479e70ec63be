"""``slimrank chat``."""

import json as json_text
import math
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from slimrank.chatting import Conversation
from slimrank.cli import options as opt
from slimrank.cli.output import friendly, print_json
from slimrank.errors import RecipeError, TextError
from slimrank.source import load_tokenizer, open_model, parse_source

ASK = "> "
FORGET, LEAVE = "/new", "/exit"


@friendly
def chat_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Dense or compressed: folder, hub id or .gguf file."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Say this and leave; may be given repeatedly, turn after turn."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token each time.")
    ] = 0.0,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    json: opt.Json = False,
) -> None:
    """Talk with MODEL, for a first taste. /new begins anew, /exit or Ctrl-D leaves.

    A model without a chat template goes on with what is said. With --json each answer is one line.
    """
    if not math.isfinite(temperature):
        raise RecipeError(f"--temperature is {temperature}; it is a finite number")
    source = parse_source(model)
    tokenizer = load_tokenizer(source)
    loaded = open_model(source, dtype or "auto", device=device).eval()
    talk = Conversation(loaded, tokenizer, system, max_new_tokens, temperature)
    if not talk.has_template:
        typer.echo("note: no chat template; the model goes on with the text", err=True)
    for text in _typed() if prompt is None else prompt:
        if prompt is None and text == FORGET:
            talk.forget()
            continue
        try:
            _turn(talk, text, as_json=json)
        except TextError as error:
            if prompt is not None:
                raise
            typer.echo(f"error: {error}", err=True)


def _turn(talk: Conversation, text: str, as_json: bool) -> None:
    start = time.perf_counter()
    answer = talk.answer(text, (lambda _piece: None) if as_json else _write)
    if not as_json:
        typer.echo()
        return
    seconds = time.perf_counter() - start
    values = {"prompt": text, "answer": answer.text, "tokens": answer.tokens, "seconds": seconds}
    print_json(json_text.dumps(values))


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Lines from the keyboard, or from a pipe; empty ones are passed over."""
    while True:
        if sys.stdin.isatty():
            typer.echo(ASK, nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == LEAVE:
            return
        if line.strip():
            yield line.strip()
