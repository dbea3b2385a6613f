"""What clients may ask for: OpenAI's requests, as far as this server does what they say.

A field that is neither here nor in ``neutral`` is refused, as is a value that would have to be
ignored (penalties, tools). ``top_k`` and ``ignore_eos`` are extensions, which OpenAI's client sends
by ``extra_body``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rotq.serve.http.neutral import Neutral, NeutralChat, NeutralCompletion
from rotq.serve.http.strict import (
    EMPTY_EXTRAS,
    NULL_EXTRAS,
    Integer,
    Integers,
    Off,
    Strict,
    Tolerant,
)

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_TOP = 20

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Integers]

LARGEST_SEED = 9223372036854776000
"""OpenAI's bound: a schema has floats for bounds, and would write 2^63 itself as this number."""


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Off | None = None
    include_obfuscation: Off | None = None


class ResponseFormat(Strict):
    """Plain text, the only format there is."""

    type: Literal["text"]


class Common(Neutral):
    """What both kinds of requests have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), Integer] | None = None
    """0 is no bound, and so is -1, as vLLM and SGLang write it."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Integer] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED), Integer] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Common, NeutralCompletion):
    """Body of ``POST /v1/completions``."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31), Integer] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), Integer] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), Integer] | None = None
    """At most ``n``: all that are made are told."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, however they were given."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[list-item, return-value]


class TextPart(Tolerant):
    """A part of a message; parts of other types are refused."""

    type: Literal["text"]
    text: str


_HAS_TEXT: dict[str, Any] = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {
            "properties": {
                "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]}
            },
            "required": ["content"],
        },
    ]
}
"""Of a message, in its schema: only an assistant may have said nothing."""


class Message(Tolerant):
    """One turn of a conversation.

    Answers are taken back as they were given: refusal, annotations, audio, function and tool calls
    may be there, as long as they are empty.
    """

    model_config = ConfigDict(json_schema_extra={**EMPTY_EXTRAS, **_HAS_TEXT})

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    """An assistant's may be null or missing, which is no text."""
    name: str | None = None

    @property
    def texts(self) -> list[str]:
        """The text of each part; a string is one."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content or ()]


_TOLD: dict[str, Any] = {
    "anyOf": [
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
    ]
}
"""Of a request, in its schema: the most likely tokens are told where log probabilities are."""


class ChatRequest(Common, NeutralChat):
    """Body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra={**NULL_EXTRAS, **_TOLD})

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31), Integer] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31), Integer] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), Integer] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that may be generated; the newer of the two fields wins."""
        return self.max_completion_tokens or self.max_tokens


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response that is no success."""

    error: ErrorDetail
