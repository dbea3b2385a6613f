"""Texts by name: files, ``datasets`` ids, and a corpus that ships with Python.

Records (JSONL lines, rows of a data set) are joined by an empty line, FASTA sequences by a newline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rotq.calibration.fasta import Record, decompress, is_fasta, parse_fasta
from rotq.errors import RotqError

HELD_OUT_TOPICS = ("debugger", "string-methods", "types")
"""Topics of ``pydoc_data`` that ``pydoc`` leaves to ``pydoc-test``.

Several topics quote each other at length; of the phrases of 13 words in these, the others hold 3.
"""

_FILE_SUFFIXES = (".txt", ".text", ".md", ".raw", ".json", ".jsonl")


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
    """What was found in a FASTA file, and what was left out of it."""


def read_text(source: str, *, split: str = "train") -> Text:
    """Read a text by file name, corpus name or ``datasets`` id.

    Args:
        source: A UTF-8 file, or one that gzip made of it (``.jsonl``: the ``text`` field of each
            line; ``.fasta``, ``.fa``, ``.faa``, ``.fas``: the sequences, see ``fasta``; anything
            else as it is), ``pydoc`` or ``pydoc-test``, or ``ID[:CONFIG][:SPLIT]`` of the
            ``datasets`` library; its ``text`` column is taken.
        split: Split of a data set where ``source`` names none.

    Raises:
        RotqError: missing, empty, not UTF-8, or without the text field; names the source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        text = _read_file(source, path)
    elif source in ("pydoc", "pydoc-test"):
        text = _of_content(source, _pydoc(held_out=source == "pydoc-test"))
    elif (
        Path(source.lower().removesuffix(".gz")).suffix in _FILE_SUFFIXES
        or is_fasta(source)
        or source.startswith((".", "~"))
    ):
        raise RotqError(f"text {source}: no such file")
    else:
        text = _of_content(source, "\n\n".join(_dataset_rows(source, split)))
    if not text.content.strip():
        raise RotqError(f"text {source} is empty")
    return text


def _of_content(source: str, content: str) -> Text:
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return Text(source=source, content=content, sha256=digest)


def _read_file(source: str, path: Path) -> Text:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise RotqError(f"text {source}: {error.strerror}") from None
    sha256 = hashlib.sha256(stored).hexdigest()
    data = decompress(source, stored)
    try:
        # line ends as Python's text mode gives them: \r\n costs tokens that other tools do not see
        content = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise RotqError(
            f"text {source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    if is_fasta(source) and content.strip():
        proteins = parse_fasta(source, data)
        return Text(
            source=source,
            content="\n".join(record.sequence for record in proteins.records),
            sha256=sha256,
            records=proteins.records,
            note=proteins.describe(),
        )
    if Path(source.lower().removesuffix(".gz")).suffix == ".jsonl":
        content = "\n\n".join(_json_records(source, content))
    return Text(source=source, content=content, sha256=sha256)


def _json_records(source: str, content: str) -> Iterable[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RotqError(f"text {source}, line {number}: not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise RotqError(f'text {source}, line {number}: no string field "text"')
        yield text


def _pydoc(*, held_out: bool) -> str:
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if (name in HELD_OUT_TOPICS) == held_out)
    return "\n\n".join(topics[name].strip() for name in names)


def _dataset_rows(source: str, split: str) -> list[str]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise RotqError(f"text {source}: expected ID[:CONFIG][:SPLIT]")
    split = rest.pop() if rest else split
    try:
        rows = datasets.load_dataset(name, rest[0] if rest else None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RotqError(f"text {source}: no such file, and datasets says: {reason}") from None
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise RotqError(f'text {source}: the data set has no column "text", only {columns}')
    return [text for text in rows["text"] if text]
