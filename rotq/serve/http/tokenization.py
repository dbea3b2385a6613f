"""Text to tokens and back, for several threads at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from rotq.serve.http.errors import ApiError
from rotq.serve.http.schemas import ChatRequest, CompletionRequest


class Tokenization:
    """A tokenizer, twice: encoding changes its state, so that has one of its own, and a lock.

    Args:
        tokenizer: Of transformers.
        vocabulary: Tokens that the model knows.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._encoder, self._decoder = tokenizer, copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def token_text(self, token: int) -> str:
        """A token's own text, special ones by their names."""
        text: str = self._decoder.decode([token], skip_special_tokens=False)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self._decoder.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt.

        Raises:
            ApiError: a prompt is no text, of no token, or has tokens that the model does not know.
        """
        found: list[list[int]] = []
        for prompt in request.prompts:
            ids = self._encode(prompt, "prompt") if isinstance(prompt, str) else list(prompt)
            wrong = next((token for token in ids if token >= self.vocabulary), None)
            if wrong is not None:
                message = f"token {wrong} is not among the model's {self.vocabulary}"
                raise ApiError(400, message, param="prompt")
            found.append(_some(ids, "prompt"))
        return found

    def conversation(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Raises:
            ApiError: there is no template, or it does not take these messages.
        """
        if not getattr(self._encoder, "chat_template", None):
            message = "this model has no chat template; use /v1/completions"
            raise ApiError(400, message, param="messages")
        messages = [message.plain() for message in request.messages]
        for plain in messages:
            _check_text(plain["content"], "messages")
        try:
            with self._lock:
                text: str = self._encoder.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
        except Exception as fault:
            # a template is a program of the model's, and may refuse in its own words
            line = " ".join(str(fault).split())[:200]
            reason = f"the model's chat template refuses these messages: {line}"
            raise ApiError(400, reason, param="messages") from fault
        return _some(self._encode(text, "messages", special=False), "messages")

    def _encode(self, text: str, param: str, *, special: bool = True) -> list[int]:
        _check_text(text, param)
        with self._lock:
            ids: list[int] = self._encoder(text, add_special_tokens=special)["input_ids"]
        return ids


def _check_text(text: str, param: str) -> None:
    """JSON may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text has lone surrogates, which are no characters"
        raise ApiError(400, message, param=param) from error


def _some(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise ApiError(400, f"{param}: this text gives the model no token", param=param)
    return ids
