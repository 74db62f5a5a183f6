"""Rows to token ids, with a label on exactly the tokens that the assistant would have produced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeft.data.chat import (
    Chat,
    Slot,
    check_no_control_tokens,
    find_slots,
    forged,
    render,
    special_ids,
    template_of,
)
from safeft.data.load import Problems
from safeft.data.rows import ROLES, FieldError, Message, Row
from safeft.errors import InputError, ModelError, RowErrors
from safeft.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out
#: Of a dataset that is trained on: 2.5 GiB as the lists that they are held in (27 bytes a token,
#: measured on 1.5 million of SmolLM2's).
MOST_TOKENS = 100_000_000
_REPORT_EVERY = 256
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """A row as the model reads it: `labels[t]` is `input_ids[t]` where trained, else -100."""

    line: int
    input_ids: list[int]
    labels: list[int]


def tokenise(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TokenisedRow:
    """Apply the model's chat template and label the trained assistant turns.

    A turn is trained from where the template's generation prompt ends to the token that closes the
    turn, inclusive; a turn of white space alone is not trained. Where the template marks assistant
    text itself with {% generation %}, that is followed instead.

    Raises RowErrors with this one row: a control token inside a content, a chat that the template
    refuses or rewrites, more than `max_tokens` tokens, or nothing to train on. ModelError if the
    tokenizer has no chat template or no offsets.
    """
    try:
        return _tokenise(row, tokenizer, max_tokens)
    except FieldError as err:
        raise RowErrors("row", [(row.line, err.field, err.reason)]) from err


def tokenise_all(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    source: str,
    progress: Progress = silent,
) -> list[TokenisedRow]:
    """`tokenise` for every row, in order.

    Raises:
        RowErrors: names `source` and every bad row.
        InputError: the rows have more than `MOST_TOKENS` tokens, which memory is not kept for.
    """
    done: list[TokenisedRow] = []
    problems, tokens = Problems(source), 0
    for i, row in enumerate(rows):
        if i % _REPORT_EVERY == 0:
            progress("tokenising", i, len(rows))
        try:
            done.append(_tokenise(row, tokenizer, max_tokens))
        except FieldError as err:
            problems.add(err.on(row.line))
            continue
        tokens += len(done[-1].input_ids)
        if tokens > MOST_TOKENS:
            raise InputError(
                f"{source}: more than {MOST_TOKENS:,} tokens (at line {row.line}); train on fewer "
                "rows"
            )
    progress("tokenising", len(rows), len(rows))
    problems.check()
    return done


def encode_prompt(
    prompt: str | Sequence[Message | Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids that ask the model for a reply: the chat (or one user turn) and an assistant's opening.

    RowErrors (line 0) for a control token inside a content or a chat that the template refuses or
    rewrites; InputError for a message without one of the three roles or without text.
    """
    chat = _prompt_chat(prompt)
    try:
        check_no_control_tokens(chat, tokenizer)
        text = render(chat, tokenizer, for_reply=True)
        ids, offsets = _encode(text, tokenizer)
        slots = find_slots(text, chat, tokenizer, for_reply=True)
        _check_no_hidden_control_tokens(text, ids, offsets, slots, special_ids(tokenizer))
    except FieldError as err:
        raise RowErrors("prompt", [(0, err.field, err.reason)]) from err
    return ids


def _prompt_chat(prompt: str | Sequence[Message | Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    chat = []
    for i, message in enumerate(prompt):
        if isinstance(message, Message):
            role, content = message.role, message.content
        else:
            role, content = message.get("role", ""), message.get("content", "")
        # A role is printed by the template as it is, so a free one could forge a turn.
        if role not in ROLES:
            raise InputError(f"messages[{i}].role: must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"messages[{i}].content: must be a string")
        chat.append({"role": role, "content": content})
    if not chat:
        raise InputError("messages: empty, so there is nothing to reply to")
    return chat


def _tokenise(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TokenisedRow:
    chat = [{"role": m.role, "content": m.content} for m in row.messages]
    trained = {i for i, m in enumerate(row.messages) if m.trained}
    check_no_control_tokens(chat, tokenizer)
    text = render(chat, tokenizer, for_reply=False)
    ids, offsets = _encode(text, tokenizer)
    if len(ids) > max_tokens:
        raise FieldError(
            "row",
            f"{len(ids)} tokens, over max_tokens={max_tokens}: shorten it or raise max_tokens",
        )
    slots = find_slots(text, chat, tokenizer, for_reply=False)
    special = special_ids(tokenizer)
    _check_no_hidden_control_tokens(text, ids, offsets, slots, special)
    if _GENERATION.search(template_of(tokenizer)):
        spans = _marked_spans(text, chat, slots, trained, tokenizer)
    else:
        spans = _turn_spans(text, chat, slots, trained, tokenizer)
    labels = _labels(len(text), spans, ids, offsets, special)
    if all(label == IGNORED for label in labels):
        raise FieldError("row", "no trained token: nothing for the model to learn from")
    return TokenisedRow(row.line, ids, labels)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    if not tokenizer.is_fast:
        raise ModelError("the model's tokenizer gives no offsets: a fast tokenizer is needed")
    out = tokenizer(
        text,
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return out["input_ids"], out["offset_mapping"]


def _check_no_hidden_control_tokens(
    text: str, ids: list[int], offsets: list[Span], slots: list[Slot], special: frozenset[int]
) -> None:
    """What the search of the contents cannot see: spellings that the tokenizer normalises."""
    for token, (start, end) in zip(ids, offsets, strict=True):
        if token not in special:
            continue
        for slot in slots:
            # Some control tokens swallow the white space beside them; that forges nothing.
            if text[max(start, slot.start) : min(end, slot.end)].strip():
                raise forged(slot.index, text[start:end])


def _turn_spans(
    text: str,
    chat: Chat,
    slots: list[Slot],
    trained: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Span]:
    """From the end of the generation prompt to the end of the text that closes the turn."""
    closing = _closing(slots, chat, tokenizer)
    spans = []
    for slot in slots:
        if slot.index not in trained:
            continue
        prompt = render(chat[: slot.index], tokenizer, for_reply=True)
        if len(prompt) > slot.start or not text.startswith(prompt):
            reason = "the chat template does not put this turn after its own generation prompt"
            raise FieldError(f"messages[{slot.index}]", reason)
        closed = len(closing) if slot.after.startswith(closing) else 0
        spans.append((len(prompt), slot.end + closed))
    return spans


def _closing(slots: list[Slot], chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template prints after an assistant's content to end the turn.

    Taken from the last assistant turn, after which no other turn's opening can be mistaken for it:
    up to the first special token, or, in a template without one, all but the white space.
    """
    last = next((s for s in reversed(slots) if chat[s.index]["role"] == "assistant"), None)
    if last is None:
        return ""
    ids, offsets = _encode(last.after, tokenizer)
    special = special_ids(tokenizer)
    ends = (end for token, (_, end) in zip(ids, offsets, strict=True) if token in special)
    return last.after[: next(ends, None)].rstrip()


def _marked_spans(
    text: str,
    chat: Chat,
    slots: list[Slot],
    trained: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Span]:
    """The {% generation %} blocks of trained turns, as characters, from transformers' renderer.

    Not its token mask: that misses the last bytes of a character split over several tokens, and
    does not say which block belongs to which turn.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, blocks = render_jinja_template(
        conversations=[list(chat)],
        chat_template=template_of(tokenizer),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    spans = []
    for slot in slots:
        if slot.index not in trained:
            continue
        around = [(s, e) for s, e in blocks[0] if s <= slot.start and slot.end <= e]
        if rendered[0] != text or len(around) != 1:
            reason = "the chat template's generation block does not enclose this turn"
            raise FieldError(f"messages[{slot.index}]", reason)
        start, end = around[0]
        spans.append((start, max(slot.end, start + len(text[start:end].rstrip()))))
    return spans


def _labels(
    characters: int,
    spans: list[Span],
    ids: list[int],
    offsets: list[Span],
    special: frozenset[int],
) -> list[int]:
    """Label the tokens that touch a span; a special token only if it begins in one."""
    inside = bytearray(characters + 1)
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    labels = []
    for token, (start, end) in zip(ids, offsets, strict=True):
        # An ordinary token may begin in the template's last space and hold the answer's first word.
        last = start + 1 if token in special else max(end, start + 1)
        labels.append(token if inside.find(1, start, last) >= 0 else IGNORED)
    return labels
