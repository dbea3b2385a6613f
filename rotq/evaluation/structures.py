"""What is known of a protein's structure: distances from mmCIF or PDB, or a list of contacts.

    mmCIF, PDB     read by gemmi (extra ``structures``): the first model's chain, its whole sequence
                   where the file says it, residues without coordinates unknown. The distance of two
                   residues is that of their C beta, of C alpha where there is none (glycine)
    RR, text       lines ``i j [d_min d_max [p]]``, residues from 1: contacts; all other pairs are
                   none. Lines of letters alone are the sequence, as in CASP's RR files; lines that
                   begin with PFRMAT and other words of CASP, or with #, are left out

Shape suffixes: L residues.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.files import decode, decompress, read_given, unpacked_name
from rotq.errors import RotqError

CONTACT = 8.0
"""Ångström below which two residues are in contact."""
STRUCTURES = (".cif", ".mmcif", ".pdb", ".ent")
_CASP = ("PFRMAT", "TARGET", "AUTHOR", "REMARK", "METHOD", "MODEL", "RMODE", "END")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Which residues of a protein are in contact."""

    name: str
    sequence: str
    contact_LL: Tensor
    """bool, symmetric."""
    known_L: Tensor
    """bool, residues whose place is known."""


def is_structure(path: Path) -> bool:
    """Whether a file is one of coordinates, by its ending."""
    return Path(unpacked_name(path.name)).suffix in STRUCTURES


def read_structure(path: Path, *, chain: str | None = None) -> Structure:
    """Read mmCIF or PDB, packed or not.

    Args:
        path: Of the file.
        chain: Its name; None takes the first that is a protein.

    Raises:
        RotqError: gemmi is missing, or the file cannot be read or has no such protein.
    """
    if importlib.util.find_spec("gemmi") is None:
        raise RotqError("structures need gemmi; install the extra: pip install 'rotq[structures]'")
    import gemmi

    data = decompress(str(path), read_given(path, f"cannot read {path}"))
    try:
        found = gemmi.read_structure_string(data)
    except (ValueError, RuntimeError) as error:
        raise RotqError(f"{path}: {' '.join(str(error).split())}") from None
    found.setup_entities()
    polymer = _polymer(path, found, chain)
    sequence, residues = _aligned(found, polymer)
    place_L3 = torch.full((len(sequence), 3), torch.nan, dtype=torch.float64)
    for index, residue in residues.items():
        atom = residue.find_atom("CB", "*") or residue.find_atom("CA", "*")
        if atom is not None:
            place_L3[index] = torch.tensor(atom.pos.tolist(), dtype=torch.float64)
    name = unpacked_name(path.name).rpartition(".")[0]
    return Structure(
        name=path.name[: len(name)],
        sequence=sequence,
        contact_LL=torch.cdist(place_L3, place_L3) < CONTACT,
        known_L=~place_L3.isnan().any(1),
    )


def read_contacts(path: Path, sequence: str | None = None) -> Structure:
    """Read a list of contacts.

    Args:
        path: Of the file, packed or not.
        sequence: The protein, where the file does not have it.

    Raises:
        RotqError: no sequence is known, or a line is no contact of it; names the line.
    """
    content = decode(str(path), decompress(str(path), read_given(path, f"cannot read {path}")))
    letters, pairs = [], []
    for number, line in enumerate(content.content.split("\n"), start=1):
        words = line.split()
        if not words or words[0] in _CASP or words[0].startswith("#"):
            continue
        if len(words) == 1 and re.fullmatch(r"[A-Za-z]+", words[0]):
            letters.append(words[0].upper())
        else:
            pairs.append((number, _pair(path, number, words)))
    sequence = "".join(letters) or sequence
    if sequence is None:
        raise RotqError(f"{path} has no sequence; give it with --fasta")
    contact_LL = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
    for number, (first, second) in pairs:
        if not 1 <= min(first, second) <= max(first, second) <= len(sequence):
            raise RotqError(
                f"{path}, line {number}: residues {first} and {second}, and the protein has "
                f"{len(sequence)}"
            )
        contact_LL[first - 1, second - 1] = contact_LL[second - 1, first - 1] = True
    return Structure(
        name=path.name,
        sequence=sequence,
        contact_LL=contact_LL,
        known_L=torch.ones(len(sequence), dtype=torch.bool),
    )


def _pair(path: Path, number: int, words: list[str]) -> tuple[int, int]:
    try:
        first, second = int(words[0]), int(words[1])
        [float(word) for word in words[2:]]
    except (ValueError, IndexError):
        raise RotqError(f"{path}, line {number}: no contact such as '12 40'") from None
    return first, second


def _polymer(path: Path, structure: Any, chain: str | None) -> Any:
    import gemmi

    proteins = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    found: dict[str, Any] = {}
    for each in structure[0] if len(structure) else ():
        polymer = each.get_polymer()
        if polymer and polymer.check_polymer_type() in proteins:
            found.setdefault(each.name, polymer)
    if not found or (chain is not None and chain not in found):
        what = f"chain {chain} that is a protein" if chain else "protein chain"
        raise RotqError(f"{path} has no {what}; it has {', '.join(found) or 'none'}")
    return found[chain] if chain else next(iter(found.values()))


def _aligned(structure: Any, polymer: Any) -> tuple[str, dict[int, Any]]:
    """The whole sequence, and the residues that have coordinates by their place in it."""
    import gemmi

    residues = list(polymer.first_conformer())
    entity = structure.get_entity_of(polymer)
    whole = [gemmi.Entity.first_mon(item) for item in entity.full_sequence] if entity else []
    if not whole:
        return _letters([residue.name for residue in residues]), dict(enumerate(residues))
    kind = polymer.check_polymer_type()
    aligned = gemmi.align_sequence_to_polymer(whole, polymer, kind)
    gapped_whole = aligned.add_gaps("x" * len(whole), 1)
    gapped_seen = aligned.add_gaps("x" * len(residues), 2)
    by_place: dict[int, Any] = {}
    place = seen = 0
    for of_whole, of_seen in zip(gapped_whole, gapped_seen, strict=True):
        if of_whole == of_seen == "x":
            by_place[place] = residues[seen]
        place += of_whole == "x"
        seen += of_seen == "x"
    return _letters(whole), by_place


def _letters(names: list[str]) -> str:
    """One letter each: of a modified residue its parent's, X where there is none."""
    import gemmi

    found = (gemmi.find_tabulated_residue(name).one_letter_code.upper() for name in names)
    return "".join(letter if letter.isalpha() else "X" for letter in found)
