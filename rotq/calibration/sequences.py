"""Proteins from a file, one reader for all who want some.

    .fasta .fa .faa .fas    FASTA
    .a3m                    an alignment; its sequences without gaps
    .pir .nbrf .ali         PIR; also by any other name, see ``fasta``
    .csv .tsv .tab          a column of sequences, known by its name; commas, semicolons or tabs
    anything else           FASTA or PIR if it starts with a header, else one sequence on each line

Each may be packed and in any of the encodings of ``files``; ``-`` is standard input, which has no
ending. A list has no names, so its sequences are called by their numbers; lines that break off at
60, 70, 80 or 100 letters are one sequence that was wrapped, and refused, since they would be many.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

from rotq.calibration.fasta import Entry, Proteins, collected, fasta_entries, is_pir, pir_entries
from rotq.calibration.files import decode, decompress, read_given, unpacked_name
from rotq.errors import RotqError

FASTA_ENDINGS = (".fasta", ".fa", ".faa", ".fas")
_PIR_ENDINGS = (".pir", ".nbrf", ".ali")
_TABLES = (".csv", ".tsv", ".tab")
_SEQUENCES = ("sequence", "seq", "protein_sequence", "protein", "mutated_sequence", "aa_seq")
"""Columns of sequences, the first that a table has; without regard to case."""
_NAMES = ("name", "id", "entry", "accession", "protein_id", "header", "mutant")
_WRAPPED = (60, 70, 80, 100)


def read_proteins(path: Path) -> Proteins:
    """Read the proteins of a file; ``-`` is standard input.

    Raises:
        RotqError: no such file, damaged, not of its format, a character that no sequence has, or no
            sequence at all; names file and record.
    """
    return parse_proteins(str(path), read_given(path, f"cannot read {path}"))


def parse_proteins(source: str, data: bytes) -> Proteins:
    """The proteins of a file's bytes, packed or not; errors as ``read_proteins``."""
    content, is_utf8 = decode(source, decompress(source, data), latin=True)
    return collected(source, _reader(source, content)(source, content), is_utf8=is_utf8)


def holds_proteins(source: str) -> bool:
    """Whether a file of this name is always read as proteins, by whatever model."""
    return _ending(source) in (*FASTA_ENDINGS, *_PIR_ENDINGS, ".a3m")


def _reader(source: str, content: str) -> Callable[[str, str], list[Entry]]:
    ending = _ending(source)
    if ending in _TABLES:
        return _table_entries
    if ending == ".a3m":
        return lambda source, content: fasta_entries(source, content, a3m=True)
    if ending in _PIR_ENDINGS or is_pir(content):
        return pir_entries
    if ending in FASTA_ENDINGS or not content or content.lstrip().startswith((">", ";")):
        return fasta_entries
    return _list_entries


def _table_entries(source: str, content: str) -> list[Entry]:
    """One of each row."""
    first = content.lstrip("\n").partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(content), delimiter=delimiter, strict=True)
    try:
        columns, rows = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise RotqError(f"{source}, line {reader.line_num}: {error}") from None
    sequence, name = _column(columns, _SEQUENCES), _column(columns, _NAMES)
    if sequence is None:
        raise RotqError(
            f"{source} has no column {' or '.join(_SEQUENCES)}; it has {', '.join(columns)}"
        )
    numbered = enumerate(rows, start=1)
    return [
        Entry((row[name] or "").strip() if name else str(number), "", row[sequence] or "")
        for number, row in numbered
    ]


def _column(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _list_entries(source: str, content: str) -> list[Entry]:
    """One of each line, called by its number."""
    lines = [line.strip() for line in content.split("\n")]
    kept = [(n, line) for n, line in enumerate(lines, start=1) if line and line[0] != "#"]
    for number, line in kept:
        strange = re.search(r"[^A-Za-z*.\-]", line)
        if strange:
            raise RotqError(
                f"text {source} is neither FASTA (it does not start with a > header) nor a list of "
                f"sequences: line {number} holds {strange.group()!r}"
            )
    lengths = {len(line) for _, line in kept[:-1]}
    if len(lengths) == 1 and lengths <= set(_WRAPPED) and len(kept[-1][1]) < min(lengths):
        raise RotqError(
            f"text {source} looks like one sequence on lines of {min(lengths)}; put a > header "
            "before it, or each sequence on one line"
        )
    return [Entry(str(number), "", line) for number, (_, line) in enumerate(kept, start=1)]


def _ending(source: str) -> str:
    return Path(unpacked_name(source)).suffix
