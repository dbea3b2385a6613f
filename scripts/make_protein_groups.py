"""Pick the sequences of ``rotq eval pll --groups`` from a UniProt FASTA file.

    python scripts/make_protein_groups.py uniprot.fasta rotq/evaluation/protein_groups.fasta

Only reviewed entries ("sp|") that are no fragments, eight for each group, the first that fit:

    short-peptide    15 to 50 residues, whole, experimentally seen (PE=1)
    transmembrane    the 40 residues with the highest mean hydropathy (Kyte and Doolittle 1982),
                     at least 2, of proteins named as channels, transporters, receptors and the like
    active-site      51 residues around the catalytic motif of proteins named as that enzyme
    disordered       the 80 residues richest in A R G Q S P E K (Dunker et al. 2001), at least 80 %

One sequence of a kind is enough: names that begin with the same word are taken once.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rotq.calibration.fasta import AMBIGUOUS, Record
from rotq.calibration.sequences import read_proteins

EACH = 8
HYDROPATHY = {
    **{"A": 1.8, "R": -4.5, "N": -3.5, "D": -3.5, "C": 2.5, "Q": -3.5, "E": -3.5, "G": -0.4},
    **{"H": -3.2, "I": 4.5, "L": 3.8, "K": -3.9, "M": 1.9, "F": 2.8, "P": -1.6, "S": -0.8},
    **{"T": -0.7, "W": -0.9, "Y": -1.3, "V": 4.2},
}
MEMBRANE = r"(?i)transport|permease|channel|receptor|cytochrome b|oxidase subunit|ATP synthase sub"
ENZYMES = {
    r"(?i)kinase": r"HRD[LIV]K..N",
    r"(?i)trypsin|thrombin|kallikrein|plasmin": r"GDSGG[PS]",
    r"(?i)pepsin|renin|cathepsin D|aspartic": r"[LIVF]DTG[ST]",
    r"(?i)metallo|thermolysin|aminopeptidase": r"HE..H",
    r"(?i)lipase|esterase|cutinase": r"G[HYW]SQG|G[HYF]S.G",
    r"(?i)lactamase": r"S..K",
    r"(?i)phosphatase": r"HC[SAG][AV]G.[GS]R",
    r"(?i)lysozyme": r"[FY]ES.[FYR]",
}
DISORDER = set("ARGQSPEK")

Piece = tuple[int, int]


def best_window(sequence: str, width: int, score: Callable[[str], float]) -> tuple[float, Piece]:
    """The highest mean over a window, and where it is."""
    values = [score(letter) for letter in sequence]
    sums = [(sum(values[i : i + width]) / width, i) for i in range(len(values) - width + 1)]
    best, start = max(sums, key=lambda pair: (pair[0], -pair[1]), default=(float("-inf"), 0))
    return best, (start, start + width)


def short_peptide(record: Record) -> Piece | None:
    fits = 15 <= len(record.sequence) <= 50 and "PE=1" in record.description
    return (0, len(record.sequence)) if fits else None


def transmembrane(record: Record) -> Piece | None:
    if not re.search(MEMBRANE, record.description):
        return None
    mean, piece = best_window(record.sequence, 40, lambda letter: HYDROPATHY[letter])
    return piece if mean >= 2 else None


def active_site(record: Record) -> Piece | None:
    for name, motif in ENZYMES.items():
        found = re.search(motif, record.sequence) if re.search(name, record.description) else None
        if found and "inhibitor" not in record.description.lower():
            start = max(0, (found.start() + found.end()) // 2 - 25)
            return start, min(len(record.sequence), start + 51)
    return None


def disordered(record: Record) -> Piece | None:
    share, piece = best_window(record.sequence, 80, lambda letter: letter in DISORDER)
    return piece if share >= 0.8 else None


GROUPS = {
    "short-peptide": short_peptide,
    "transmembrane": transmembrane,
    "active-site": active_site,
    "disordered": disordered,
}


def pick(records: Sequence[Record]) -> Iterator[tuple[str, Record, Piece]]:
    """(group, record, piece) of every sequence that is taken."""
    for group, find in GROUPS.items():
        seen: set[str] = set()
        for record in records:
            kind = record.description.split()[0].rstrip(",")
            piece = find(record) if kind not in seen and len(seen) < EACH else None
            if piece:
                seen.add(kind)
                yield group, record, piece


def usable(record: Record) -> bool:
    reviewed = record.name.startswith("sp|") and "(Fragment" not in record.description
    return reviewed and not (AMBIGUOUS | set("UO")) & set(record.sequence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fasta", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    records = [record for record in read_proteins(arguments.fasta).records if usable(record)]
    lines = [
        "; Pieces of reviewed entries of UniProt (The UniProt Consortium, www.uniprot.org),",
        "; licence CC BY 4.0; picked by scripts/make_protein_groups.py, which says how.",
        "; Header: entry, group, first and last residue, the entry's own description.",
    ]
    for group, record, (start, end) in pick(records):
        lines.append(f">{record.name} group={group} {start + 1}-{end} {record.description}")
        lines.append(record.sequence[start:end])
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
