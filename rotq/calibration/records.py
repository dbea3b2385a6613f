"""JSON records, on lines, in a list, or alone: each an object with a ``text`` or with ``messages``.

``messages`` are a chat, as for ``tokenizer.apply_chat_template``: {"role": ..., "content": ...}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rotq.errors import RotqError

Chat = tuple[Mapping[str, Any], ...]
"""Messages in their order."""


def json_texts(source: str, content: str) -> list[str | Chat]:
    """The ``text`` field of each record, or its ``messages`` where it has no text.

    Args:
        source: Of the content, for errors.
        content: JSON lines (empty ones are skipped), one JSON list of records, or one record.

    Raises:
        RotqError: a record is not JSON, has neither field, or holds half a character; names the
            line, or the record in a list.
    """
    return [json_record(source, place, record) for place, record in _records(source, content)]


def check_characters(source: str, place: str, text: str) -> None:
    """Refuse half a character (a lone surrogate), which JSON can spell and UTF-8 cannot.

    Raises:
        RotqError: there is one; names it and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RotqError(
            f"text {source}, {place}: half a character, \\u{ord(text[error.start]):04x}; "
            "take it out, or put \\ufffd in its place"
        ) from None


def looks_like_json_lines(content: str) -> bool:
    """Whether the first line with anything on it is a record with a ``text``."""
    first = content.lstrip().partition("\n")[0]
    if not first.startswith("{"):
        return False
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record.get("text"), str)


def _records(source: str, content: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each record."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        # more than one value, or the line that is wrong is to be named
        yield from _lines(source, content)
        return
    if isinstance(whole, list):
        yield from ((f"record {number}", record) for number, record in enumerate(whole, start=1))
    else:
        blank = len(content) - len(content.lstrip())
        number = 1 + content.count("\n", 0, blank)
        yield f"line {number}", whole


def _lines(source: str, content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise RotqError(f"text {source}, {place}: not JSON: {reason}") from None
        yield place, record


def json_record(source: str, place: str, record: Any) -> str | Chat:
    """One record of ``json_texts``, which stands at ``place``."""
    if isinstance(record, dict) and "text" not in record and "messages" in record:
        return _chat(source, place, record["messages"])
    return _text(source, place, record)


def _chat(source: str, place: str, messages: Any) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise RotqError(f'text {source}, {place}: "messages" is no list of messages')
    for number, message in enumerate(messages, start=1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RotqError(f'text {source}, {where}: no string field "role"')
        if isinstance(message.get("content"), str):
            check_characters(source, where, message["content"])
    return tuple(messages)


def _text(source: str, place: str, record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise RotqError(f'text {source}, {place}: no string field "text", and no "messages"')
    check_characters(source, place, text)
    return text
