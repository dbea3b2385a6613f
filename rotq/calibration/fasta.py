"""Protein sequences from FASTA files.

    >name and description       a record begins; its sequence may take any number of lines
    ; comment                   left out, as are empty lines

How a file is unpacked and decoded is in ``files``; headers may be Latin-1, as in older databases.
What stands in a sequence:

    letters        upper case is made of lower case, which marks masked or aligned regions
    X B Z J        kept: unknown or ambiguous residues, which are never scored
    U O            kept: selenocysteine and pyrrolysine are residues
    - .            left out: gaps of an alignment
    *              left out at the end; a record with a stop inside is no protein and is left out
    anything else  is an error

Records without a residue are left out. How many records were left out is kept. Names need not
differ, and may be missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rotq.calibration.files import decode, decompress, find_path, read_stored
from rotq.errors import RotqError

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
AMBIGUOUS = frozenset("XBZJ")
"""Letters that stand for no one residue."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sequence of a FASTA file and its header."""

    name: str
    """Up to the first space or tab of the header."""
    sequence: str
    """Residues as upper case letters, without gaps and stops."""
    description: str = ""
    """The rest of the header."""


@dataclass(frozen=True, kw_only=True)
class Proteins:
    """The records of a file, and what was left out of it."""

    source: str
    records: tuple[Record, ...]
    num_empty: int = 0
    num_stops: int = 0
    """Records with a stop inside."""
    is_utf8: bool = True
    """Else its headers were read as Latin-1."""

    def describe(self) -> str:
        """One line: how many sequences and residues, and what is odd about the file."""
        residues = sum(len(record.sequence) for record in self.records)
        return "; ".join((f"{len(self.records)} sequences, {residues} residues", *self.oddities()))

    def oddities(self) -> list[str]:
        """What was left out, and how headers were read where they are not UTF-8."""
        left_out = [
            f"{number} {what}"
            for number, what in ((self.num_empty, "empty"), (self.num_stops, "with stops"))
            if number
        ]
        found = [f"left out: {', '.join(left_out)}"] if left_out else []
        return found if self.is_utf8 else [*found, "headers are not UTF-8, read as Latin-1"]


def is_fasta(source: str) -> bool:
    """Whether a file of this name is read as FASTA: by its ending, .gz aside."""
    return Path(source.lower().removesuffix(".gz")).suffix in SUFFIXES


def read_fasta(path: Path) -> Proteins:
    """Read a FASTA file.

    Raises:
        RotqError: no such file, damaged gzip, not FASTA, a character that no sequence has, or no
            sequence at all; names file and record.
    """
    found = find_path(str(path)) or path
    return parse_fasta(str(path), read_stored(found, f"cannot read {path}"))


def parse_fasta(source: str, data: bytes) -> Proteins:
    """The records of a FASTA file's bytes; errors as ``read_fasta``."""
    content, is_utf8 = decode(source, decompress(source, data), latin=True)
    records: list[Record] = []
    num_empty = num_stops = 0
    for header, lines in _split(source, content):
        name, _, description = header.replace("\t", " ").partition(" ")
        sequence = _clean(source, name, lines)
        if not sequence:
            num_empty += 1
        elif "*" in sequence:
            num_stops += 1
        else:
            records.append(Record(name=name, sequence=sequence, description=description.strip()))
    found = Proteins(
        source=source,
        records=tuple(records),
        num_empty=num_empty,
        num_stops=num_stops,
        is_utf8=is_utf8,
    )
    if not records:
        raise RotqError("; ".join((f"{source} holds no protein sequence", *found.oddities())))
    return found


def _split(source: str, content: str) -> list[tuple[str, list[str]]]:
    """(header, lines of the sequence as they stand) of each record."""
    found: list[tuple[str, list[str]]] = []
    for line in content.split("\n"):
        line = line.strip()
        if line.startswith(">"):
            found.append((line[1:].strip(), []))
        elif line and not line.startswith(";"):
            if not found:
                raise RotqError(f"text {source} is not FASTA: it does not start with a > header")
            found[-1][1].append(line)
    return found


def _clean(source: str, name: str, lines: list[str]) -> str:
    sequence = re.sub(r"[\s.\-]", "", "".join(lines)).rstrip("*")
    # before letters are raised: upper() makes two residues of an eszett
    strange = re.search(r"[^A-Za-z*]", sequence)
    if strange:
        raise RotqError(f"{source}: record {name or '(no name)'} holds {strange.group()!r}")
    return sequence.upper()
