"""Texts of JSON records: an object with a string ``text`` on each line, in a list, or alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rotq.errors import RotqError


def json_texts(source: str, content: str) -> list[str]:
    """The ``text`` field of each record.

    Args:
        source: Of the content, for messages.
        content: JSON lines (empty ones are skipped), one JSON list of records, or one record.

    Raises:
        RotqError: a record is not JSON, has no such field, or holds half a character; names the
            line, or the record in a list.
    """
    return [_text(source, place, record) for place, record in _records(source, content)]


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


def _text(source: str, place: str, record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise RotqError(f'text {source}, {place}: no string field "text"')
    check_characters(source, place, text)
    return text
