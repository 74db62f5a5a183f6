"""``safeft chat``: talk to a base model, with or without an adapter, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.console import err, out, print_json, printable, progress_bars


def chat(
    model: Annotated[str, typer.Option(help="Base model, as a source string.")] = "demo:aligned",
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter, or directory of a tuned model.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this, print the answer, leave.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2048)] = 96,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --message: print question and answer as JSON.")
    ] = False,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends the conversation; /new starts another."""
    from safeft.errors import InputError, SafeftError
    from safeft.evaluate import generate_greedy
    from safeft.models import load_merged, load_tokenizer, resolve

    if as_json and message is None:
        raise InputError("--json needs --message")
    with progress_bars() as progress:
        directory = resolve(model, progress)
        progress("loading the model", 0, None)
        tokenizer = load_tokenizer(directory)
        loaded = load_merged(directory, adapter)

    def answer(turns: list[dict[str, str]]) -> str:
        return generate_greedy(loaded, tokenizer, [turns], max_new_tokens=max_new_tokens)[0]

    if message is not None:
        reply = answer([{"role": "user", "content": message}])
        if as_json:
            print_json({"message": message, "answer": reply})
        else:
            out.print(printable(reply), markup=False)
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
            reply = answer([*turns, {"role": "user", "content": said}])
        except SafeftError as error:
            err.print(f"{error}; /new starts again", style="red", markup=False)
            continue
        turns += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        out.print(printable(reply), style="green", markup=False)
