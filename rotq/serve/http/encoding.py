"""What turns text and conversations into tokens, in a process of its own.

A tokenizer is native code and a chat template is a program, both the model's: they may hang, panic
or take all memory, on texts that clients choose. So they run where they can be ended, and where
long texts keep nobody from computing. ``encoder_process`` is the other end.

``python -m rotq.serve.http.encoding FD`` reads a pickled tokenizer and then jobs from a socket.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rotq.calibration.chats import ChatTemplate

ROOM = 4 << 30
"""Bytes that the process may take beyond those of the tokenizer."""


class Refused(Exception):  # noqa: N818
    """The template does not take the messages; in its own words."""


class Encoder:
    """Encodes for one tokenizer.

    Args:
        tokenizer: Of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, generation=True)

    def encode(self, text: str, *, special: bool, offsets: bool = False) -> dict[str, Any]:
        """``ids`` of a text, and ``offsets`` in it, (begin, end) of each token.

        Args:
            text: What to encode.
            special: Add the tokens that begin or end a text.
            offsets: Wanted; they are null if the tokenizer cannot tell.
        """
        told = offsets and bool(getattr(self._tokenizer, "is_fast", False))
        found = self._tokenizer(
            text,
            add_special_tokens=special,
            return_attention_mask=False,
            return_offsets_mapping=told,
            verbose=False,
        )
        return {"ids": found["input_ids"], "offsets": found["offset_mapping"] if told else None}

    def converse(self, messages: list[dict[str, Any]], *, longest: int) -> dict[str, Any]:
        """``ids`` of a conversation under the model's template.

        Args:
            messages: Each with role, texts and perhaps a name.
            longest: Characters; what becomes longer is only measured, as ``characters``.

        Raises:
            Refused: see there.
        """
        try:
            text = self._template.render([self._message(**item) for item in messages])
        except Exception as fault:
            line = " ".join(str(fault).split())[:200]
            raise Refused(f"the model's chat template refuses these messages: {line}") from fault
        if len(text) > longest:
            return {"characters": len(text)}
        return self.encode(text, special=False)

    def _message(self, *, role: str, texts: list[str], name: str | None = None) -> dict[str, Any]:
        """A message as the template takes it."""
        message = {"role": role, "content": self._template.content(role, texts)}
        return message | ({} if name is None else {"name": name})


def answer(encoder: Encoder, job: dict[str, Any]) -> dict[str, Any]:
    """What comes of a job, for JSON: its result, or why there is none."""
    call: Callable[..., dict[str, Any]] = getattr(encoder, job["call"])
    try:
        return call(**job["given"])
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"failed": _line(error)}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def main(descriptor: int) -> None:
    """Do jobs until the socket is closed; a job that takes too long ends the process.

    After a panic of native code it ends too, as nobody knows what was left half done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # they may be for all of a terminal or a service; the server says when it is over
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        encoder = Encoder(pickle.loads(connection.recv_bytes()))
    except Exception as error:
        _reply(connection, {"failed": _line(error)})
        return
    _reply(connection, {})
    _limit_memory()
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        try:
            found = answer(encoder, job)
        except BaseException as panic:
            _reply(connection, {"failed": _line(panic), "last": True})
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(connection, found)


def _reply(connection: Connection, found: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(found).encode())


def _limit_memory() -> None:
    """Of this process, where the system tells how much it has."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        used = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))


if __name__ == "__main__":
    main(int(sys.argv[1]))
