"""The tenants' tasks: GSM8K from a file, and sorting messages, which is written here by seed.

Sorting asks for a queue's name and a number in a fixed form, so an answer is right or wrong.
Without training no model knows the names or the form. Wordings of held-out rows are in no training
row, but the names speak for themselves: with names that mean nothing, 108 rows taught the demo
model the form and left its choice of the name at chance.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, assert_never

from safeft.data import Message, Row, load_rows
from safeft.errors import InputError

Task = Literal["gsm8k", "sorting"]
TASK_NAMES: dict[Task, str] = {"gsm8k": "GSM8K", "sorting": "sorting messages"}
HELD_OUT = 80
_MAX_CHARACTERS = 420  # of a GSM8K row: about 150 tokens, so that a step stays short

#: By name: wordings to train on, and wordings to measure on.
_QUEUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "delivery": (
        (
            "the parcel still has not arrived",
            "where is my delivery",
            "the courier says it was handed over, but nothing came",
            "tracking has shown no movement for a week",
            "my shipment seems to be lost",
            "when will the box get here",
        ),
        ("I am still waiting for the parcel", "the delivery is late again", "has it been shipped"),
    ),
    "billing": (
        (
            "I was charged twice",
            "the invoice shows the wrong amount",
            "please send me a receipt",
            "my card was billed for something I did not buy",
            "why does the bill include a fee",
            "the discount is missing on the invoice",
        ),
        ("there is an extra charge on my bill", "the total is wrong", "I need a copy of the bill"),
    ),
    "returns": (
        (
            "I want to send it back",
            "how do I return this",
            "it does not fit, please take it back",
            "I changed my mind and would like my money back",
            "please start a return for me",
            "can I swap it for another size",
        ),
        ("I would like to return it", "please refund me", "may I exchange it for a larger one"),
    ),
    "account": (
        (
            "I cannot log in",
            "the password reset mail never came",
            "please change the email address of my account",
            "my account is locked",
            "the code for signing in is not accepted",
            "how do I delete my profile",
        ),
        ("signing in fails every time", "I forgot my password", "please unlock my account"),
    ),
    "damage": (
        (
            "it broke after two days",
            "the zip is torn",
            "one part was cracked when I opened the box",
            "it does not switch on",
            "the lamp flickers",
            "a screw is missing and it wobbles",
        ),
        ("it stopped working", "the handle came off", "it arrived damaged"),
    ),
    "product": (
        (
            "do you have it in green",
            "how heavy is the large one",
            "is the blue model in stock",
            "which size should I choose",
            "is it waterproof",
            "does it work with older models",
        ),
        ("what colours are there", "how long is the cable", "will you get more of them"),
    ),
}
_NAMES = ("Ana", "Ben", "Chloe", "Dev", "Emeka", "Fatima", "Goran", "Hana", "Ivo", "June", "Kofi")
_ARTICLES = ("desk lamp", "rain jacket", "bike pump", "kettle", "backpack", "headset", "tent")


def training_rows(task: Task, count: int, seed: int, gsm8k: Path) -> list[Row]:
    """`count` rows, drawn by `seed`; none of them is held out."""
    match task:
        case "gsm8k":
            pool = _short_gsm8k(gsm8k)[:-HELD_OUT]
            if count > len(pool):
                raise InputError(f"{gsm8k} has {len(pool)} short rows for training, not {count}")
            return random.Random(f"gsm8k {seed}").sample(pool, count)
        case "sorting":
            return _sorting(count, seed=f"training {seed}", held_out=False)
        case _:
            assert_never(task)


def held_out_rows(task: Task, gsm8k: Path) -> list[Row]:
    """The `HELD_OUT` rows that every cell of the task is measured on."""
    if task == "gsm8k":
        return _short_gsm8k(gsm8k)[-HELD_OUT:]
    return _sorting(HELD_OUT, seed="held out", held_out=True)


def _short_gsm8k(path: Path) -> list[Row]:
    rows = load_rows(path)
    return [r for r in rows if sum(len(m.content) for m in r.messages) <= _MAX_CHARACTERS]


def _sorting(count: int, *, seed: str, held_out: bool) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for line in range(1, count + 1):
        queue = draw.choice(list(_QUEUES))
        wording = draw.choice(_QUEUES[queue][held_out])
        number = draw.randrange(1000, 10000)
        article, name = draw.choice(_ARTICLES), draw.choice(_NAMES)
        question = (
            f"Message {number} about a {article}: {wording[0].upper()}{wording[1:]}. {name}"
            "\nSort it."
        )
        rows.append(chat(line, question, f"queue {queue} / message {number}"))
    return rows


def chat(line: int, question: str, answer: str) -> Row:
    """One question and the answer that is trained on."""
    return Row(line, (Message("user", question, False), Message("assistant", answer, True)))
