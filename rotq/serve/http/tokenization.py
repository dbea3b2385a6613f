"""Text to tokens and back: encoding in processes of its own, decoding in this one."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rotq.calibration.tokens import encode
from rotq.errors import RotqError, reason, told
from rotq.serve.engine.sampling import Picked
from rotq.serve.engine.text_stream import TextStream, finished
from rotq.serve.http.encoder_process import EncoderLost, EncoderProcess
from rotq.serve.http.errors import ApiError, of_failure
from rotq.serve.http.lanes import Lane
from rotq.serve.http.schemas import Message
from rotq.serve.http.token_names import TokenNames

SHORT = 32768
"""Characters; longer texts have a process of their own, so that short ones need not wait."""

_SECONDS, _RATE = 10.0, 10_000
"""A short text may take so long; a longer one has one more for so many characters."""

_WIDEST = 64
"""Characters of a token at least: some tokenizers leave out spaces, or join what is unknown."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a completion begins with."""

    ids: list[int]
    text: str | None = None
    """As an answer repeats it, without special tokens and an unfinished character at its end."""
    offsets: Sequence[int] | None = None
    """Where each token begins in ``text``; special ones have no length there."""
    owed: bool = False
    """The unfinished character is not in ``text``."""


class Tokenization:
    """A tokenizer, at work in three processes: for texts, for conversations, for all that is long.

    Args:
        tokenizer: Of transformers.
        vocabulary: Tokens that the model knows.
        longest: Tokens of a prompt; what must be more is refused before it is encoded.
        limit: Requests that may wait for each process.
        on_error: Told of texts that the tokenizer failed on.

    Raises:
        RotqError: the tokenizer cannot be sent to another process.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        *,
        longest: int,
        limit: int,
        on_error: Callable[[Exception], None],
    ) -> None:
        with told("the tokenizer cannot be sent to another process"):
            pickled = pickle.dumps(tokenizer)
        self.vocabulary, self.longest = vocabulary, longest
        self._tokenizer, self._on_error = tokenizer, on_error
        widest = max(map(len, tokenizer.get_vocab()), default=1)
        self._characters = longest * max(widest, _WIDEST)
        self._lanes = {
            name: Lane(EncoderProcess(pickled), limit) for name in ("text", "chat", "long")
        }
        self._names: TokenNames | None = None

    def start(self) -> None:
        """Start the processes that first requests will need, so that these need not wait.

        Raises:
            RotqError: the tokenizer does not load in one.
        """
        names = ("text", "chat") if self._has_template else ("text",)
        with ThreadPoolExecutor(len(names)) as threads:
            list(threads.map(lambda name: self._lanes[name].process.start(), names))

    def close(self) -> None:
        """End the processes, and with them what they do."""
        for lane in self._lanes.values():
            lane.process.close()

    @property
    def takes_nothing(self) -> bool:
        """Whether a prompt without any text has a token all the same, as BOS is one."""
        return bool(encode(self._tokenizer, "", special=True))

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    async def names(self) -> TokenNames:
        """What tokens are called; made when somebody asks for the first time."""
        if self._names is None:
            self._names = await asyncio.to_thread(
                self._guarded, TokenNames, self._tokenizer, self.vocabulary
            )
        assert self._names is not None
        return self._names

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self._guarded(
            self._tokenizer.decode,
            list(ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return text

    async def prompt(
        self, given: str | list[int], client: str, *, echo: bool, offsets: bool
    ) -> Prompt:
        """The tokens of a prompt, and what an answer repeats of it if it is to.

        Raises:
            ApiError: it is no text, of no token, too long, or has tokens that the model lacks.
        """
        if isinstance(given, str):
            return await self._of_text(given, client, offsets=echo and offsets)
        ids = self._checked(given, "prompt")
        if not echo:
            return Prompt(ids=ids)
        return await asyncio.to_thread(self._of_tokens, ids, offsets=offsets)

    async def conversation(self, messages: Sequence[Message], client: str) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Raises:
            ApiError: there is no template, it does not take these messages, or they are too long.
        """
        if not self._has_template:
            message = "this model has no chat template; use /v1/completions"
            raise ApiError(400, message, param="messages")
        plain, size = [], 0
        for item in messages:
            for text in item.texts:
                _check_text(text, "messages")
                size += len(text)
            named = {} if item.name is None else {"name": item.name}
            plain.append({"role": item.role, "texts": item.texts, **named})
        lane = "chat" if size <= SHORT else "long"
        found = await self._ask(
            lane, client, "messages", size, "converse", messages=plain, longest=self._characters
        )
        if "characters" in found:
            self._check_size(found["characters"], "messages")
        return self._checked(found["ids"], "messages")

    async def _of_text(self, text: str, client: str, *, offsets: bool) -> Prompt:
        _check_text(text, "prompt")
        lane = "text" if len(text) <= SHORT else "long"
        options = {"text": text, "special": True, "offsets": offsets}
        found = await self._ask(lane, client, "prompt", len(text), "encode", **options)
        ids = self._checked(found["ids"], "prompt")
        told: Sequence[int] | None = None
        if found["offsets"] is not None:
            told = _begins(found["offsets"])
        elif offsets:
            told = (await asyncio.to_thread(self._of_tokens, ids, offsets=True)).offsets
        return Prompt(ids=ids, text=text, offsets=told)

    def _of_tokens(self, ids: list[int], *, offsets: bool) -> Prompt:
        """A prompt of token ids, read as the generated ones will be."""
        if not offsets:
            end = finished(self.decode, ids)
            return Prompt(ids=ids, text=self.decode(ids[:end]), owed=True)
        stream = TextStream(self.decode)
        pieces = [stream.push(Picked(token=token)) for token in ids]
        text = "".join(piece.text for piece in pieces)
        begins = [begin for piece in pieces for begin in piece.offsets]
        begins += [len(text)] * (len(ids) - len(begins))
        return Prompt(ids=ids, text=text, offsets=begins, owed=True)

    async def _ask(
        self, lane: str, client: str, param: str, size: int, name: str, **given: Any
    ) -> dict[str, Any]:
        self._check_size(size, param)
        seconds = _SECONDS + max(0, size - SHORT) / _RATE
        try:
            found = await self._lanes[lane].run(client, name, seconds, **given)
        except RotqError as lost:
            if self._lanes[lane].process.closed:
                raise of_failure("shutdown") from lost
            if not isinstance(lost, EncoderLost):
                raise
            found = {"failed": str(lost)}
        if "refused" in found:
            raise ApiError(400, found["refused"], param=param)
        if "failed" in found:
            self._on_error(RotqError(f"the tokenizer failed on a text: {found['failed']}"))
            message = (
                f"the model's tokenizer or chat template fails on this text: {found['failed']}"
            )
            raise ApiError(400, message, param=param, code="tokenizer_failed")
        return found

    def _check_size(self, characters: int, param: str) -> None:
        """Refuse what must have too many tokens, whatever they are."""
        if characters > self._characters:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.longest} tokens here; {param} of "
                f"{characters} characters are over it",
                param=param,
                code="context_length_exceeded",
            )

    def _checked(self, ids: list[int], param: str) -> list[int]:
        wrong = next((token for token in ids if token >= self.vocabulary), None)
        if wrong is not None:
            message = f"token {wrong} is not among the model's {self.vocabulary}"
            raise ApiError(400, message, param=param)
        if not ids:
            raise ApiError(400, f"{param}: this text gives the model no token", param=param)
        return ids

    @staticmethod
    def _guarded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the tokenizer; native code that panics raises what is no Exception."""
        try:
            return call(*args, **kwargs)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as panic:
            line = f"the tokenizer failed on its own tokens: {reason(panic)}"
            raise RotqError(line) from None


def _begins(offsets: Sequence[Sequence[int]]) -> list[int]:
    """Where tokens begin in the text; those that a tokenizer adds are at nothing, (0, 0)."""
    begins, reached = [], 0
    for begin, end in offsets:
        begins.append(begin if end > begin else reached)
        reached = max(reached, end)
    return begins


def _check_text(text: str, param: str) -> None:
    """JSON may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text has lone surrogates, which are no characters"
        raise ApiError(400, message, param=param) from error
