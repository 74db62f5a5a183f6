"""The requests of OpenAI's API that are understood. What would change an answer else is refused.

Fields that change nothing here (`user`, `metadata`, `store`, ...) are taken and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.serving.engine import Sampling

_MAX_TOKENS = 256


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str = Field(min_length=1, max_length=255)
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Taken and ignored.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    # Taken only where they ask for nothing.
    frequency_penalty: Literal[0, None] = 0
    presence_penalty: Literal[0, None] = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    def sampling(self) -> Sampling:
        """How its answers are generated."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.limit() or _MAX_TOKENS,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(stops),
        )

    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(BaseModel):
    """A piece of a message's content; only text is understood."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. A `developer` turn is a `system` turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates take them."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(_Body):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    logprobs: Literal[False, None] = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto", None] = None

    def limit(self) -> int | None:
        """`max_completion_tokens` is the newer name of `max_tokens`."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(_Body):
    """``POST /v1/completions``: a text to go on with, without a chat template."""

    prompt: str | list[str]
    echo: Literal[False, None] = None
    suffix: Literal["", None] = None
    logprobs: Literal[None] = None
    best_of: Literal[1, None] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> CompletionBody:
        if isinstance(self.prompt, list) and len(self.prompt) != 1:
            raise ValueError("prompt: one text a request; send several requests instead")
        return self

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
