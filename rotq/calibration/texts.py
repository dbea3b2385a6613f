"""Texts by name: files, ``datasets`` ids, and a corpus that ships with Python.

Records (of JSON, rows of a data set) are joined by an empty line, FASTA sequences by a newline.
How bytes of a file become text is in ``files``.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.calibration.fasta import Record, is_fasta, parse_fasta
from rotq.calibration.files import decode, decompress, find_path, read_stored
from rotq.calibration.records import check_characters, json_texts, looks_like_json_lines
from rotq.errors import RotqError, told

HELD_OUT_TOPICS = ("debugger", "string-methods", "types")
"""Topics of ``pydoc_data`` that ``pydoc`` leaves to ``pydoc-test``.

Several topics quote each other at length; of the phrases of 13 words in these, the others hold 3.
"""

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
    """The sequences, where the file is FASTA; else empty."""
    note: str = ""
    """What was found in a FASTA file, or what is odd about another; begins with the source."""


def read_text(source: str, *, split: str = "train") -> Text:
    """Read a text by file name, corpus name or ``datasets`` id.

    Args:
        source: A file of text (``.jsonl``, ``.ndjson``, ``.json``: the ``text`` field of each
            record; ``.fasta``, ``.fa``, ``.faa``, ``.fas``: the sequences, see ``fasta``; anything
            else as it is), or one that gzip made of it; ``pydoc`` or ``pydoc-test``; or
            ``ID[:CONFIG][:SPLIT]`` of the ``datasets`` library; its ``text`` column is taken.
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
    elif path is None and _names_a_file(source):
        raise RotqError(f"text {source}: no such file")
    else:
        text = _of_content(source, "\n\n".join(_dataset_rows(source, split)))
    if not text.content.strip():
        raise RotqError(f"text {source} is empty")
    return text


def _of_content(source: str, content: str) -> Text:
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return Text(source=source, content=content, sha256=digest)


def _names_a_file(source: str) -> bool:
    ending = _suffix(source) in _FILE_SUFFIXES or is_fasta(source)
    return ending or source.startswith((".", "~"))


def _suffix(source: str) -> str:
    return Path(source.lower().removesuffix(".gz")).suffix


def _read_file(source: str, path: Path) -> Text:
    stored = read_stored(path, f"text {source}")
    sha256 = hashlib.sha256(stored).hexdigest()
    data = decompress(source, stored)
    if is_fasta(source) and data.strip():
        return _of_proteins(source, data, sha256)
    content, note = decode(source, data).content, ""
    if _suffix(source) in _JSON_SUFFIXES:
        content = "\n\n".join(json_texts(source, content))
    elif looks_like_json_lines(content):
        note = f"{source} looks like JSON lines and is read as plain text; .jsonl reads its records"
    return Text(source=source, content=content, sha256=sha256, note=note)


def _of_proteins(source: str, data: bytes, sha256: str) -> Text:
    proteins = parse_fasta(source, data)
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


def _dataset_rows(source: str, split: str) -> list[str]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise RotqError(f"text {source}: expected ID[:CONFIG][:SPLIT]")
    config, split = rest[0] if len(rest) > 1 else None, rest[-1] if rest else split
    folder = find_path(name)
    if folder is not None and (folder / "config.json").is_file():
        raise RotqError(f"text {source} is the folder of a model; a file is needed")
    what = "no such file" if folder is None else "it is a folder"
    with told(f"text {source}: {what}, and datasets says"):
        columns, rows = _load_rows(name if folder is None else str(folder), config, split)
    if "text" not in columns:
        raise RotqError(
            f'text {source}: the data set has no column "text", only {", ".join(columns)}'
        )
    return [text for number, text in enumerate(rows) if _is_text(source, number, text)]


def _load_rows(name: str, config: str | None, split: str) -> tuple[list[str], list[Any]]:
    """Columns of a data set, and what its column "text" holds."""
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
    return columns, list(found["text"]) if "text" in columns else []


def _is_text(source: str, number: int, row: Any) -> bool:
    """Whether a row holds text; rows without any are left out."""
    if row is not None and not isinstance(row, str):
        kind = type(row).__name__
        raise RotqError(f'text {source}, row {number}: "text" is {kind}, not a string')
    if row:
        check_characters(source, f"row {number}", row)
    return bool(row)
