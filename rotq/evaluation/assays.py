"""Assays of protein variants (deep mutational scans) from CSV files, as ProteinGym has them.

    mutant              A23G, several joined by colons: A23G:K40R; positions count from 1
    mutated_sequence    the whole protein with them
    DMS_score           what was measured, higher is fitter

The wild type is what all rows agree on when their mutations are taken back; where the file has no
sequences it is given. (Notin et al., ProteinGym, NeurIPS 2023.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rotq.calibration.files import decode, decompress, read_given, unpacked_name
from rotq.errors import RotqError

MUTANT, SEQUENCE, SCORE = "mutant", "mutated_sequence", "DMS_score"
"""Columns by their names in ProteinGym."""

_SUBSTITUTION = re.compile(r"([A-Z])([1-9][0-9]*)([A-Z])")
_WILD_TYPES = frozenset(("", "WT", "_WT", "WILDTYPE"))
"""How files write a row without any mutation, in upper case."""


class Substitution(NamedTuple):
    """One residue in place of another."""

    wild: str
    position: int
    """From 0."""
    mutant: str


@dataclass(frozen=True, kw_only=True)
class Assay:
    """The variants of one protein, in the order of the file."""

    name: str
    wild_type: str
    mutants: tuple[str, ...]
    """As they are written."""
    substitutions: tuple[tuple[Substitution, ...], ...]
    scores: tuple[float, ...]

    def sequence(self, variant: int) -> str:
        """The protein of one row."""
        return _replaced(self.wild_type, self.substitutions[variant])

    @property
    def sha256(self) -> str:
        """Of all that is scored and compared."""
        content = [self.wild_type, *self.mutants, *map(repr, self.scores)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def first(self, number: int) -> Assay:
        """The first variants alone; 0 takes all."""
        taken = slice(number or None)
        return Assay(
            name=self.name,
            wild_type=self.wild_type,
            mutants=self.mutants[taken],
            substitutions=self.substitutions[taken],
            scores=self.scores[taken],
        )


def read_assay(path: Path, *, score: str = SCORE, wild_type: str | None = None) -> Assay:
    """Read one assay, packed or not.

    Args:
        path: Of the CSV file; ``-`` is standard input.
        score: The column of what was measured.
        wild_type: The protein, where the file does not have the sequences of its variants.

    Raises:
        RotqError: it cannot be read, lacks a column or a value, a mutation is not one of the wild
            type, or rows disagree about it; names the row.
    """
    source = str(path)
    content = decode(source, decompress(source, read_given(path, f"cannot read {path}"))).content
    reader = csv.DictReader(io.StringIO(content), strict=True)
    try:
        columns, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise RotqError(f"{path}, line {reader.line_num}: {error}") from None
    wanted = [MUTANT, score, *([SEQUENCE] if wild_type is None else [])]
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise RotqError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    if not rows:
        raise RotqError(f"{path} holds no variant")
    whole = [{column: (row[column] or "").strip() for column in wanted} for row in rows]
    changes = [_parse(path, line, row[MUTANT]) for line, row in enumerate(whole, 2)]
    if wild_type is None:
        wild_type = _wild_type(path, [row[SEQUENCE].upper() for row in whole], changes)
    _check(path, wild_type, changes)
    return Assay(
        name=path.name[: len(unpacked_name(path.name))].removesuffix(".csv"),
        wild_type=wild_type,
        mutants=tuple(row[MUTANT] for row in whole),
        substitutions=tuple(changes),
        scores=tuple(_number(path, line, row[score]) for line, row in enumerate(whole, 2)),
    )


def _parse(path: Path, line: int, mutant: str) -> tuple[Substitution, ...]:
    if mutant.upper() in _WILD_TYPES:
        return ()
    found = [_SUBSTITUTION.fullmatch(part.strip().upper()) for part in mutant.split(":")]
    if None in found:
        raise RotqError(
            f"{path}, line {line}: {mutant!r} is no substitution such as A23G or A23G:K40R"
        )
    changes = [Substitution(m[1], int(m[2]) - 1, m[3]) for m in found if m is not None]
    if len({change.position for change in changes}) < len(changes):
        raise RotqError(f"{path}, line {line}: {mutant!r} changes one position twice")
    return tuple(changes)


def _wild_type(
    path: Path, sequences: Sequence[str], changes: Sequence[tuple[Substitution, ...]]
) -> str:
    found = ""
    for line, (sequence, changed) in enumerate(zip(sequences, changes, strict=True), 2):
        beyond = [change for change in changed if change.position >= len(sequence)]
        if beyond or any(sequence[c.position] != c.mutant for c in changed):
            raise RotqError(f"{path}, line {line}: {SEQUENCE} does not have its mutations")
        back = _replaced(sequence, [Substitution(c.mutant, c.position, c.wild) for c in changed])
        if found and back != found:
            raise RotqError(f"{path}, line {line}: not a variant of the protein of line 2")
        found = back
    return found


def _check(path: Path, wild_type: str, changes: Sequence[tuple[Substitution, ...]]) -> None:
    for line, changed in enumerate(changes, 2):
        for wild, position, _ in changed:
            if position >= len(wild_type) or wild_type[position] != wild:
                has = wild_type[position] if position < len(wild_type) else "its end before it"
                raise RotqError(
                    f"{path}, line {line}: {wild}{position + 1}, but the wild type has {has} there"
                )


def _replaced(sequence: str, changes: Sequence[Substitution]) -> str:
    letters = list(sequence)
    for change in changes:
        letters[change.position] = change.mutant
    return "".join(letters)


def _number(path: Path, line: int, written: str) -> float:
    try:
        value = float(written)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RotqError(f"{path}, line {line}: the score {written!r} is no number")
    return value
