"""``safeft chat``: talk to a model, loaded here or served somewhere, in the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import err, out, print_json, printable, progress_bars

Answer = Callable[[list[dict[str, str]]], Iterator[str]]


def chat(
    model: Annotated[
        str | None,
        typer.Option(help="Base model, as a source string; with --url, a served model's name."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter, or directory of a tuned model.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this, print the answer, leave.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2048)] = 96,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a server: what `safeft up` printed, or an API (SAFEFT_API_KEY)."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --message: print question and answer as JSON.")
    ] = False,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends the conversation; /new starts another."""
    from safeft.errors import InputError, SafeftError

    if as_json and message is None:
        raise InputError("--json needs --message")
    if url is not None and adapter is not None:
        raise InputError("--adapter: with --url, name the served model with --model instead")
    if url is None:
        answer = _loaded(model or "demo:aligned", adapter, max_new_tokens)
    else:
        answer = _served(url, model, max_new_tokens)

    def say(turns: list[dict[str, str]], style: str | None) -> str:
        pieces = []
        for piece in answer(turns):
            pieces.append(piece)
            out.print(printable(piece), style=style, markup=False, end="")
        out.print()
        return "".join(pieces)

    if message is not None:
        asked = [{"role": "user", "content": message}]
        if as_json:
            print_json({"message": message, "answer": "".join(answer(asked))})
        else:
            say(asked, None)
        return
    turns: list[dict[str, str]] = []
    while True:
        err.print("[bold cyan]you>[/] ", end="")
        try:
            said = input().strip()
        except EOFError:
            break
        if not said:
            break
        if said == "/new":
            turns = []
            continue
        try:
            reply = say([*turns, {"role": "user", "content": said}], "green")
        except SafeftError as error:
            err.print(f"{error}; /new starts again", style="red", markup=False)
            continue
        turns += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]


def _loaded(source: str, adapter: Path | None, max_new_tokens: int) -> Answer:
    from safeft.evaluate import generate_greedy
    from safeft.models import load_merged, load_tokenizer, resolve

    with progress_bars() as progress:
        directory = resolve(source, progress)
        progress("loading the model", 0, None)
        tokenizer = load_tokenizer(directory)
        loaded = load_merged(directory, adapter)

    def answer(turns: list[dict[str, str]]) -> Iterator[str]:
        yield generate_greedy(loaded, tokenizer, [turns], max_new_tokens=max_new_tokens)[0]

    return answer


def _served(url: str, model: str | None, max_new_tokens: int) -> Answer:
    from cluster.serving.client import chat_stream

    key = os.environ.get("SAFEFT_API_KEY")
    return lambda turns: chat_stream(url, model, turns, max_new_tokens, key)
