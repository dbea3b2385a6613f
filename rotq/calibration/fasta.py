"""Protein sequences from FASTA files.

    >name and description       a record begins; its sequence may take any number of lines
    ; comment                   left out, as are empty lines

Files may be compressed by gzip, whatever they are called. What stands in a sequence:

    letters        upper case is made of lower case, which marks masked or aligned regions
    X B Z J        kept: unknown or ambiguous residues, which are never scored
    U O            kept: selenocysteine and pyrrolysine are residues
    - .            left out: gaps of an alignment
    *              left out at the end; a record with a stop inside is no protein and is left out
    anything else  is an error

Records without a residue are left out. How many records were left out is kept.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from rotq.errors import RotqError

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
AMBIGUOUS = frozenset("XBZJ")
"""Letters that stand for no one residue."""

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sequence of a FASTA file and its header."""

    name: str
    """Up to the first space of the header."""
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

    def describe(self) -> str:
        """One line: how many sequences and residues, and what was left out."""
        residues = sum(len(record.sequence) for record in self.records)
        left_out = [
            f"{number} {what}"
            for number, what in ((self.num_empty, "empty"), (self.num_stops, "with stops"))
            if number
        ]
        note = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{len(self.records)} sequences, {residues} residues{note}"


def is_fasta(source: str) -> bool:
    """Whether a file of this name is read as FASTA: by its ending, .gz aside."""
    return Path(source.lower().removesuffix(".gz")).suffix in SUFFIXES


def read_fasta(path: Path) -> Proteins:
    """Read a FASTA file.

    Raises:
        RotqError: no such file, damaged gzip, not FASTA, a character that no sequence has, or no
            sequence at all; names file and record.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RotqError(f"cannot read {path}: {error.strerror}") from None
    return parse_fasta(str(path), decompress(str(path), data))


def decompress(source: str, data: bytes) -> bytes:
    """The content of a file that gzip may have made; by its first bytes, not by its name.

    Raises:
        RotqError: damaged.
    """
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise RotqError(f"{source}: damaged gzip file: {error}") from None


def parse_fasta(source: str, data: bytes) -> Proteins:
    """The records of FASTA text; errors as ``read_fasta``."""
    records: list[Record] = []
    num_empty = num_stops = 0
    for header, raw in _split(source, data.decode("utf-8", errors="replace")):
        name, _, description = header.partition(" ")
        sequence = _clean(source, name, raw)
        if not sequence:
            num_empty += 1
        elif "*" in sequence:
            num_stops += 1
        else:
            records.append(Record(name=name, sequence=sequence, description=description.strip()))
    if not records:
        raise RotqError(f"{source} holds no protein sequence")
    return Proteins(source=source, records=tuple(records), num_empty=num_empty, num_stops=num_stops)


def _split(source: str, content: str) -> list[tuple[str, str]]:
    """(header, sequence as it stands) of each record."""
    found: list[tuple[str, list[str]]] = []
    for line in content.splitlines():
        line = line.strip()
        if line.startswith(">"):
            found.append((line[1:].strip(), []))
        elif line and not line.startswith(";"):
            if not found:
                raise RotqError(f"text {source} is not FASTA: it does not start with a > header")
            found[-1][1].append(line)
    return [(header, "".join(lines)) for header, lines in found]


def _clean(source: str, name: str, raw: str) -> str:
    sequence = re.sub(r"[\s.\-]", "", raw.upper()).rstrip("*")
    strange = re.search(r"[^A-Z*]", sequence)
    if strange:
        raise RotqError(f"{source}: record {name or '(no name)'} holds {strange.group()!r}")
    return sequence
