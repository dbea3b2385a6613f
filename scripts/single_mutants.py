"""All single mutants of proteins as assays in ProteinGym's form, for ``rotq eval dms``.

    python scripts/single_mutants.py heldout.fasta out/mutants --proteins 5
    rotq eval dms out/esm-w3 --assay out/mutants --reference models/esm

Nothing was measured on them: ``DMS_score`` is 0 in each row, so rho with the assay is not defined.
What they are for is rho of a quantized model's scores with the original's.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from rotq.calibration.residues import RESIDUES
from rotq.calibration.sequences import read_proteins
from rotq.evaluation.assays import MUTANT, SCORE, SEQUENCE


def single_mutants(protein: str) -> Iterator[tuple[str, str]]:
    """(mutation, protein with it) of each residue and each other of the 20; X and the like stay."""
    for place, wild in enumerate(protein):
        for mutant in RESIDUES if wild in RESIDUES else "":
            if mutant != wild:
                yield (
                    f"{wild}{place + 1}{mutant}",
                    f"{protein[:place]}{mutant}{protein[place + 1 :]}",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fasta", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--proteins", type=int, default=5, help="from the start of the file")
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for record in read_proteins(arguments.fasta).records[: arguments.proteins]:
        file = arguments.folder / f"{record.name.replace('/', '_')}.csv"
        with file.open("x", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow((MUTANT, SEQUENCE, SCORE))
            for mutation, protein in single_mutants(record.sequence[: arguments.max_length]):
                writer.writerow((mutation, protein, 0))


if __name__ == "__main__":
    main()
