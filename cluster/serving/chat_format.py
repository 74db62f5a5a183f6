"""Answers in the shapes of OpenAI's API: whole objects, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.serving.engine import Delta
from cluster.serving.model_server import Result

Route = Literal["chat", "completions"]
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """What every piece of one answer has in common."""

    route: Route
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def new(route: Route, model: str) -> Shape:
        """For a new answer."""
        prefix = "chatcmpl" if route == "chat" else "cmpl"
        return Shape(route, model, f"{prefix}-{secrets.token_hex(12)}")

    def whole(self, result: Result) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        kind = "chat.completion" if self.route == "chat" else "text_completion"
        choices = []
        for index, answer in enumerate(result.answers):
            choice: dict[str, Any] = {"index": index, "logprobs": None}
            if self.route == "chat":
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            choices.append({**choice, "finish_reason": answer.finish})
        tokens = sum(answer.tokens for answer in result.answers)
        return self._object(kind, choices) | {"usage": usage(result.prompt_tokens, tokens)}

    def opening(self, index: int) -> str:
        """The first chunk of a chat answer, which names the role."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)])

    def piece(self, delta: Delta) -> str:
        """A chunk with new text, the end, or both."""
        if self.route == "completions":
            choice = {"index": delta.index, "text": delta.text, "logprobs": None}
            return self._chunk([{**choice, "finish_reason": delta.finish}])
        content = {"content": delta.text} if delta.text else {}
        return self._chunk([self._delta(delta.index, content, delta.finish)])

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> str:
        """The chunk after the last one, for those who asked for it."""
        return self._chunk([], usage(prompt_tokens, tokens))

    def _delta(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> str:
        kind = "chat.completion.chunk" if self.route == "chat" else "text_completion"
        chunk = self._object(kind, choices)
        if used is not None:
            chunk["usage"] = used
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """OpenAI's token counts. Of several answers to one prompt, the prompt counts once."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
