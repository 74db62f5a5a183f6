"""A chat rendered by the model's own template, and where in that text each message's content lies.

A template is a program, so nothing is guessed from its source. The chat is rendered a second time
with a placeholder for each content: what stands around the placeholders is the template's own text,
and the real rendering must be that text with the contents between. A template that drops, repeats
or rewrites a content is thereby noticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from safeft.data.rows import FieldError
from safeft.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]

# Private-use characters: no template or tokenizer gives them a meaning.
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True, slots=True)
class Slot:
    """Characters start..end of a rendered chat: the content of message `index`."""

    index: int
    start: int
    end: int
    after: str  # the template's own text up to the next content or the end


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's default chat template. ModelError if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as err:
        raise ModelError(
            "the model's tokenizer has no chat template: use a chat (instruct) model, "
            "or set tokenizer.chat_template"
        ) from err


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, for_reply: bool) -> str:
    """The chat as text; `for_reply` adds the template's opening of an assistant turn.

    FieldError if the template refuses the chat (a system message, two user turns in a row, ...).
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=for_reply
            )
        )
    except TemplateError as err:
        raise FieldError("messages", f"the model's chat template refuses this chat: {err}") from err


def find_slots(
    text: str, chat: Chat, tokenizer: PreTrainedTokenizerBase, *, for_reply: bool
) -> list[Slot]:
    """Where `text`, the rendering of `chat`, holds each content, in the order it does.

    A template may strip a content. One of white space alone has no slot: templates may leave out
    an empty message altogether. FieldError names the content that the template changes.
    """
    pieces = _PLACEHOLDER.split(render(_with_placeholders(chat), tokenizer, for_reply=for_reply))
    if not text.startswith(pieces[0]):
        raise _changed(0)
    slots: list[Slot] = []
    position = len(pieces[0])
    for index, after in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        content = chat[index]["content"]
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        fits = (v for v in variants if text.startswith(v + after, position))
        shown = next(fits, None)
        if shown is None:
            raise _changed(index)
        slots.append(Slot(index, position, position + len(shown), after))
        position += len(shown) + len(after)
    order = [slot.index for slot in slots]
    for index, message in enumerate(chat):
        if message["content"].strip() and order.count(index) != 1:
            raise _changed(index)
    if position != len(text):
        raise _changed(len(chat) - 1)
    return slots


def _changed(index: int) -> FieldError:
    reason = "the model's chat template does not print this content once and unchanged"
    return FieldError(f"messages[{index}].content", reason)


def _with_placeholders(chat: Chat) -> list[dict[str, str]]:
    return [
        {**message, "content": f"\ue000{i}\ue001"} if message["content"].strip() else dict(message)
        for i, message in enumerate(chat)
    ]


def check_no_control_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
    """FieldError if a content holds text that the tokenizer or template uses to mark turns."""
    tokens = _control_tokens(tokenizer, template_of(tokenizer), len(tokenizer))
    for i, message in enumerate(chat):
        content = message["content"]
        if found := next((token for token in tokens if token in content), None):
            raise forged(i, found)


def forged(index: int, token: str) -> FieldError:
    reason = f"contains the control token {token[:40]!r} of the model: remove or reword it"
    return FieldError(f"messages[{index}].content", reason)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that only a control token in the text can produce."""
    return _special_ids(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, _size: int) -> frozenset[int]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    named: list[int] = tokenizer.all_special_ids
    return frozenset(named) | {i for i, token in added.items() if token.special}


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, size: int
) -> tuple[str, ...]:
    """Special tokens, and the <...> and [...] markers that older templates write as plain text."""
    special: list[str] = tokenizer.convert_ids_to_tokens(sorted(_special_ids(tokenizer, size)))
    markers = {m for piece in _template_text(tokenizer) for m in _MARKER.findall(piece)}
    # Longest first, so that the message shows the whole token.
    return tuple(sorted({*special, *markers} - {""}, key=lambda token: (-len(token), token)))


def _template_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the template prints around a short chat's contents, with a system turn if it can."""
    roles = ("system", "user", "assistant", "user")
    chat = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
    try:
        text = render(chat, tokenizer, for_reply=False)
    except FieldError:  # no system turns: Gemma's template, for one
        text = render(chat[1:], tokenizer, for_reply=False)
    return _PLACEHOLDER.split(text)[::2]
