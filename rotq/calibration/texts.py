"""Texts by name: files, ``datasets`` ids, and a corpus that ships with Python.

Records (of JSON, rows of a data set) are joined by an empty line, FASTA sequences by a newline.
How bytes of a file become text is in ``files``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rotq.calibration.fasta import Record
from rotq.calibration.files import decode, decompress, find_path, read_stored, unpacked_name
from rotq.calibration.records import (
    Chat,
    json_record,
    json_texts,
    looks_like_json_lines,
)
from rotq.calibration.sequences import holds_proteins, parse_proteins
from rotq.errors import RotqError, told

HELD_OUT_TOPICS = ("debugger", "string-methods", "types")
"""Topics of ``pydoc_data`` that ``pydoc`` leaves to ``pydoc-test``.

Several topics quote each other at length; of the phrases of 13 words in these, the others hold 3.
"""

SELF = "self"
"""What the model to be calibrated writes, see ``sampled``; a file of that name wins."""

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FILE_SUFFIXES = (".txt", ".text", ".md", ".raw", *_JSON_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text and where it came from."""

    source: str
    """The file, id or corpus name as it was given."""
    content: str
    sha256: str
    """Of the file's bytes; of the UTF-8 content where there is no file."""
    records: tuple[Record, ...] = ()
    """The sequences, where the file is one of proteins by its name; else empty."""
    parts: tuple[str | Chat, ...] = ()
    """The records, where some are chats, which only a model's own template makes text of."""
    note: str = ""
    """What was found in a file of proteins, or is odd about another; begins with the source."""


def read_text(source: str, *, split: str = "train") -> Text:
    """Read a text by file name, corpus name or ``datasets`` id.

    Args:
        source: A file of text (``.jsonl``, ``.ndjson``, ``.json``: of each record the ``text``, or
            the ``messages``; of proteins, see ``sequences``, the sequences; anything else as it
            is), packed or not; ``pydoc`` or ``pydoc-test``; or
            ``ID[:CONFIG][:SPLIT]`` of the ``datasets`` library, of which the column ``text`` is
            taken, or ``messages``.
        split: Split of a data set where ``source`` names none.

    Raises:
        RotqError: missing, no file, not to be read, empty, in an unknown encoding, or without the
            text field; names the source.
    """
    path = find_path(source)
    if path is not None and path.is_file():
        text = _read_file(source, path)
    elif source in ("pydoc", "pydoc-test"):
        text = _of_content(source, _pydoc(held_out=source == "pydoc-test"))
    elif source == SELF:
        raise RotqError(
            f"text {source} is what a model writes for its own calibration, and no other"
        )
    elif path is None and _names_a_file(source):
        raise RotqError(f"text {source}: no such file")
    else:
        text = _of_records(source, tuple(_dataset_rows(source, split)))
    if not text.content.strip():
        raise RotqError(f"text {source} is empty")
    return text


def is_own_text(source: str) -> bool:
    """Whether a source stands for what the model writes itself."""
    return source == SELF and find_path(source) is None


def _of_content(source: str, content: str) -> Text:
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return Text(source=source, content=content, sha256=digest)


def _names_a_file(source: str) -> bool:
    ending = _suffix(source) in _FILE_SUFFIXES or holds_proteins(source)
    return ending or source.startswith((".", "~"))


def _suffix(source: str) -> str:
    return Path(unpacked_name(source)).suffix


def _read_file(source: str, path: Path) -> Text:
    stored = read_stored(path, f"text {source}")
    sha256 = hashlib.sha256(stored).hexdigest()
    data = decompress(source, stored)
    if holds_proteins(source) and data.strip():
        return _of_proteins(source, data, sha256)
    content, note = decode(source, data).content, ""
    if _suffix(source) in _JSON_SUFFIXES:
        return _of_records(source, tuple(json_texts(source, content)), sha256)
    if looks_like_json_lines(content):
        note = f"{source} looks like JSON lines and is read as plain text; .jsonl reads its records"
    return Text(source=source, content=content, sha256=sha256, note=note)


def _of_records(source: str, parts: tuple[str | Chat, ...], sha256: str | None = None) -> Text:
    """Records joined; chats stay apart, as nothing but a template can write them."""
    chats = not all(isinstance(part, str) for part in parts)
    words = [part if isinstance(part, str) else json.dumps(part) for part in parts]
    text = _of_content(source, "\n\n".join(words))
    return replace(text, sha256=sha256 or text.sha256, parts=parts if chats else ())


def _of_proteins(source: str, data: bytes, sha256: str) -> Text:
    proteins = parse_proteins(source, data)
    return Text(
        source=source,
        content="\n".join(record.sequence for record in proteins.records),
        sha256=sha256,
        records=proteins.records,
        note=f"{source}: {proteins.describe()}",
    )


def _pydoc(*, held_out: bool) -> str:
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if (name in HELD_OUT_TOPICS) == held_out)
    return "\n\n".join(topics[name].strip() for name in names)


def _dataset_rows(source: str, split: str) -> list[str | Chat]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise RotqError(f"text {source}: expected ID[:CONFIG][:SPLIT]")
    config, split = rest[0] if len(rest) > 1 else None, rest[-1] if rest else split
    folder = find_path(name)
    if folder is not None and (folder / "config.json").is_file():
        raise RotqError(f"text {source} is the folder of a model; a file is needed")
    what = "no such file" if folder is None else "it is a folder"
    with told(f"text {source}: {what}, and datasets says"):
        columns, column, rows = _load_rows(name if folder is None else str(folder), config, split)
    if column is None:
        raise RotqError(
            f'text {source}: the data set has no column "text" or "messages", only '
            f"{', '.join(columns)}"
        )
    kept = [(number, row) for number, row in enumerate(rows) if row]
    return [json_record(source, f"row {number}", {column: row}) for number, row in kept]


def _load_rows(
    name: str, config: str | None, split: str
) -> tuple[list[str], str | None, list[Any]]:
    """Columns of a data set, the one that is read, and what it holds."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, split=split)
    finally:
        if bars:
            datasets.enable_progress_bars()
    columns = list(found.column_names)
    column = next((name for name in ("text", "messages") if name in columns), None)
    return columns, column, [] if column is None else list(found[column])
