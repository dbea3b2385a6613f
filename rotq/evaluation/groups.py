"""The sequences that come with rotq, by kind of protein, as TurboESM groups its own.

``protein_groups.fasta`` says where they are from, ``scripts/make_protein_groups.py`` how they were
picked. They show where a model is hurt; they are too few to rank methods by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files

from rotq.calibration.fasta import Record
from rotq.calibration.sequences import parse_proteins

FILE = "protein_groups.fasta"


def load_groups() -> dict[str, list[Record]]:
    """Records by group, in the order of the file."""
    data = files("rotq.evaluation").joinpath(FILE).read_bytes()
    return grouped(parse_proteins(FILE, data).records, FILE)


def grouped(records: Iterable[Record], other: str) -> dict[str, list[Record]]:
    """Records by what stands behind ``group=`` in their headers, in their order.

    Args:
        records: Of one file.
        other: The group of those that name none.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        named = re.search(r"(?:^|\s)group=(\S+)", record.description)
        groups.setdefault(other if named is None else named[1], []).append(record)
    return groups
