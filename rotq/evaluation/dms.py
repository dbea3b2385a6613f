"""Assays scored by a model and the one it was made from, and what is kept of it between runs.

A folder of results holds ``ASSAY.csv``, the scores of all variants, for each finished assay, and
``dms.json``: what scored them, and the figures. A run that meets its own folder goes on where the
last one stopped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.calibration.residues import ResidueCodec
from rotq.disk.destination import exists
from rotq.disk.files import make_folder, whole_file
from rotq.errors import RotqError
from rotq.evaluation.assays import MUTANT, Assay
from rotq.evaluation.ranks import spearman
from rotq.evaluation.variants import Kind, VariantProtocol, score_variants

SUMMARY = "dms.json"
_MADE_BY = "rotq eval dms"


@dataclass(frozen=True, kw_only=True)
class AssayScores:
    """All scores of one assay."""

    assay: Assay
    model: dict[Kind, list[float]]
    reference: dict[Kind, list[float]] | None

    def figures(self) -> dict[str, Any]:
        """Spearman's rho by kind: with the assay, and with the reference's own scores."""
        measured = self.assay.scores
        found: dict[str, Any] = {"variants": len(measured), "length": len(self.assay.wild_type)}
        for kind, scores in self.model.items():
            found[kind] = {"assay": spearman(scores, measured)}
            if self.reference is not None:
                theirs = self.reference[kind]
                found[kind]["reference_assay"] = spearman(theirs, measured)
                found[kind]["reference"] = spearman(scores, theirs)
        return found

    def table(self) -> str:
        """One row for each variant, as CSV."""
        columns: dict[str, Sequence[Any]] = {
            MUTANT: self.assay.mutants,
            "measured": self.assay.scores,
            **{str(kind): ours for kind, ours in self.model.items()},
        }
        if self.reference is not None:
            columns |= {f"reference {kind}": theirs for kind, theirs in self.reference.items()}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()


def score_assay(
    models: Sequence[tuple[Any, ResidueCodec]],
    assay: Assay,
    protocol: VariantProtocol,
    on_pass: Callable[[str, int, int], None] | None = None,
) -> AssayScores:
    """Score one assay.

    Args:
        models: The one in question, and its reference if there is one; with their codecs.
        assay: What is scored.
        protocol: Its window fits both.
        on_pass: As for ``score_variants``.

    Raises:
        RotqError: see ``score_variants``.
    """
    scored = [score_variants(model, codec, assay, protocol, on_pass) for model, codec in models]
    return AssayScores(
        assay=assay, model=scored[0], reference=scored[1] if len(scored) > 1 else None
    )


class ResultsFolder:
    """Scores of finished assays."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """
        Args:
            path: Made if need be.
            key: What the scores depend on: models and protocol, plain values.

        Raises:
            RotqError: it holds the results of something else, or files of other makers.
        """
        self.path, self.key = path, json.loads(json.dumps(key))
        self.finished: dict[str, dict[str, Any]] = {}
        if exists(path / SUMMARY):
            self.finished = self._read()

    def check(self, names: Sequence[str]) -> None:
        """Refuse, before anything is scored, names whose files are not this folder's.

        Raises:
            RotqError: there is such a file.
        """
        for name in names:
            file = self._table(name)
            if name not in self.finished and exists(file):
                raise RotqError(f"{file} exists and is no result of this run; move it away")

    def add(self, scores: AssayScores) -> dict[str, Any]:
        """Keep one assay; returns its figures."""
        name = scores.assay.name
        figures = {**scores.figures(), "sha256": scores.assay.sha256}
        make_folder(self.path)
        self.finished[name] = figures
        with whole_file(self._table(name)) as file:
            file.write(scores.table().encode())
        stored = {"made_by": _MADE_BY, "key": self.key, "assays": self.finished}
        with whole_file(self.path / SUMMARY) as file:
            file.write(f"{json.dumps(stored, indent=1)}\n".encode())
        return figures

    def found(self, assay: Assay) -> dict[str, Any] | None:
        """The figures of an assay that was scored before; None if it has changed since."""
        figures = self.finished.get(assay.name)
        return figures if figures is not None and figures["sha256"] == assay.sha256 else None

    def scores(self, name: str) -> dict[str, list[float]]:
        """Columns of numbers of a finished assay."""
        with open(self._table(name), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {
            column: [float(row[column]) for row in rows] for column in rows[0] if column != MUTANT
        }

    def plot(self, name: str) -> Path:
        """Where a picture of a finished assay goes."""
        return self.path / f"{name}.png"

    def _table(self, name: str) -> Path:
        return self.path / f"{name}.csv"

    def _read(self) -> dict[str, dict[str, Any]]:
        file = self.path / SUMMARY
        try:
            stored = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise RotqError(f"cannot read {file}: {error}") from None
        if not isinstance(stored, dict) or stored.get("made_by") != _MADE_BY:
            raise RotqError(f"{file} is not rotq's; choose another output")
        if stored["key"] != self.key:
            other = sorted(key for key in self.key if stored["key"].get(key) != self.key[key])
            raise RotqError(
                f"{self.path} holds scores with another {', '.join(other)}; choose another output"
            )
        finished: dict[str, dict[str, Any]] = stored["assays"]
        return finished


def means(assays: Mapping[str, Mapping[str, Any]], kinds: Sequence[Kind]) -> dict[str, Any]:
    """Over assays, by kind: mean figures, the mean and the worst change against the reference."""
    found: dict[str, Any] = {}
    for kind in kinds:
        rows = {name: figures[kind] for name, figures in assays.items()}
        fields = dict.fromkeys(field for row in rows.values() for field in row)
        found[kind] = {field: _mean([row[field] for row in rows.values()]) for field in fields}
        changes = {
            name: abs(row["assay"] - row["reference_assay"])
            for name, row in rows.items()
            if None not in (row["assay"], row.get("reference_assay"))
        }
        if changes:
            worst = max(changes, key=lambda name: changes[name])
            found[kind] |= {
                "change": _mean(list(changes.values())),
                "worst_change": changes[worst],
                "worst_assay": worst,
            }
    return found


def described(protocol: VariantProtocol) -> dict[str, Any]:
    """What of a protocol the scores depend on."""
    return {"kinds": protocol.kinds, "window": protocol.window}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
