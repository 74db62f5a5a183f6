"""Token ids to text as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer, handed out piece by piece.

    Joined, the pieces are the decoded answer up to its first stop text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # Tokens before `_told` were handed out; those from `_context` on are decoded again with
        # the new ones, because a token's text may depend on the one before it.
        self._context = self._told = 0
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; the text that is certain now."""
        self._ids.append(token)
        told = self._decode(self._context, self._told)
        now = self._decode(self._context, len(self._ids))
        if now.endswith(_INCOMPLETE) or len(now) <= len(told):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return self._pass_on(now[len(told) :])

    def finish(self, tokens: Sequence[int] = ()) -> str:
        """Take the last tokens; all that is left."""
        self._ids.extend(tokens)
        told = self._decode(self._context, self._told)
        rest = self._decode(self._context, len(self._ids))[len(told) :]
        self._context = self._told = len(self._ids)
        text = self._pass_on(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _pass_on(self, text: str) -> str:
        held = self._held + text
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
