"""Protein sequences behind > headers: FASTA, alignments in A3M, and PIR (NBRF).

    FASTA   >name and description       its sequence may take any number of lines
            ; comment                   left out, as are empty lines
    A3M     the same; lower case letters are insertions and stay, gaps go; >ss_pred and its like are
            annotations and are left out; # lines and NULs, as between alignments of MMseqs2, go
    PIR     >P1;name, a line of description, the sequence up to a *; what follows is comment

A file is PIR if all its headers are, whatever it is called: read as FASTA, its descriptions would
be residues. What stands in a sequence:

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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rotq.errors import RotqError

AMBIGUOUS = frozenset("XBZJ")
"""Letters that stand for no one residue."""

_PIR = re.compile(r">\s*([A-Z][A-Z0-9]);\s*(.*)")
_PIR_PROTEINS = ("P1", "F1", "XX")
_ANNOTATIONS = frozenset(("ss_pred", "ss_conf", "ss_dssp", "sa_dssp", "aa_dssp", "bb_dssp"))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One protein of a file, and how it is called."""

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


class Entry(NamedTuple):
    """A record as it stands in a file."""

    name: str
    description: str
    written: str
    """The sequence, with gaps, stops and spaces."""


def collected(source: str, entries: Iterable[Entry], *, is_utf8: bool = True) -> Proteins:
    """The proteins of a file.

    Args:
        source: Its name, for messages.
        entries: What stands in it.
        is_utf8: As of ``Proteins``.

    Raises:
        RotqError: a character that no sequence has, or no sequence at all; names file and record.
    """
    records: list[Record] = []
    num_empty = num_stops = 0
    for name, description, written in entries:
        sequence = _clean(source, name, written)
        if not sequence:
            num_empty += 1
        elif "*" in sequence:
            num_stops += 1
        else:
            records.append(Record(name=name, sequence=sequence, description=description))
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


def fasta_entries(source: str, content: str, *, a3m: bool = False) -> list[Entry]:
    """The records of a FASTA file, or of an alignment.

    Raises:
        RotqError: it does not start with a header.
    """
    found: list[tuple[str, list[str]]] = []
    content = content.replace("\0", "") if a3m else content
    for line in content.split("\n"):
        line = line.strip()
        if line.startswith(">"):
            found.append((line[1:].strip(), []))
        elif line and not line.startswith(";") and not (a3m and line.startswith("#")):
            if not found:
                raise RotqError(f"text {source} is not FASTA: it does not start with a > header")
            found[-1][1].append(line)
    entries = _entries(found)
    return [entry for entry in entries if entry.name not in _ANNOTATIONS] if a3m else entries


def is_pir(content: str) -> bool:
    """Whether every header of a file is one of PIR."""
    headers = [line for line in content.split("\n") if line.lstrip().startswith(">")]
    return bool(headers) and all(_PIR.match(line.strip()) for line in headers)


def pir_entries(source: str, content: str) -> list[Entry]:
    """The records of a PIR file.

    Raises:
        RotqError: a header is none of PIR's, or an entry is no protein; names the line or entry.
    """
    found: list[tuple[str, list[str]]] = []
    described = ended = True
    for number, line in enumerate(content.split("\n"), start=1):
        line = line.strip()
        if line.startswith(">"):
            header = _PIR.match(line)
            if header is None:
                raise RotqError(f"{source}, line {number}: {line[:40]!r} is no header of PIR")
            if header[1] not in _PIR_PROTEINS:
                raise RotqError(f"{source}: entry {header[2]} is of type {header[1]}, no protein")
            found.append((header[2], []))
            described = ended = False
        elif not found and line:
            raise RotqError(f"text {source} is not PIR: it does not start with a >P1; header")
        elif not described:
            found[-1] = (f"{found[-1][0]} {line}", [])
            described = True
        elif not ended:
            residues, star, _ = line.partition("*")
            found[-1][1].append(residues)
            ended = bool(star)
    return _entries(found)


def _entries(found: Iterable[tuple[str, list[str]]]) -> list[Entry]:
    """Of (header, lines of the sequence)."""
    named = ((header.replace("\t", " ").partition(" "), lines) for header, lines in found)
    return [Entry(name, rest.strip(), "".join(lines)) for (name, _, rest), lines in named]


def _clean(source: str, name: str, written: str) -> str:
    sequence = re.sub(r"[\s.\-]", "", written).rstrip("*")
    # before letters are raised: upper() makes two residues of an eszett
    strange = re.search(r"[^A-Za-z*]", sequence)
    if strange:
        raise RotqError(f"{source}: record {name or '(no name)'} holds {strange.group()!r}")
    return sequence.upper()
