"""Precision of a model's contacts against a structure, and their agreement with another model's.

    P@L, P@L/5     share of true contacts among the L, or L/5, pairs of highest score, L residues
                   with coordinates; pairs with an unknown residue do not count
    ranges         short: 6 to 11 residues apart along the chain, medium: 12 to 23, long: from 24
    overlap        share of the reference's top L pairs, at least 6 apart, among the model's top L
    correlation    Pearson, of the scores of pairs at least 6 apart

A range without a true contact has no precision. (Ranges and counts are CASP's; Rao et al., ICLR
2021.)

Shape suffixes: L residues, N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rotq.evaluation.structures import Structure

APART = 6
"""Least distance along the chain of what counts as a contact."""
RANGES = {"short": (6, 12), "medium": (12, 24), "long": (24, None)}
_SHARES = {"P@L": 1, "P@L/5": 5}


def precisions(score_LL: Tensor, structure: Structure) -> dict[str, dict[str, float | None]]:
    """By range: P@L and P@L/5; None where the range has no true contact.

    Args:
        score_LL: Higher is nearer.
        structure: Of the same residues.
    """
    length = len(score_LL)
    known_LL = structure.known_L[:, None] & structure.known_L
    residues = int(structure.known_L.sum())
    row_LL = torch.arange(length)
    apart_LL = row_LL - row_LL[:, None]
    found: dict[str, dict[str, float | None]] = {}
    for name, (least, most) in RANGES.items():
        chosen_LL = known_LL & (apart_LL >= least)
        if most is not None:
            chosen_LL &= apart_LL < most
        score_N, true_N = score_LL[chosen_LL], structure.contact_LL[chosen_LL]
        found[name] = {
            field: _precision(score_N, true_N, max(residues // share, 1))
            for field, share in _SHARES.items()
        }
    return found


def map_agreement(ours_LL: Tensor, theirs_LL: Tensor) -> tuple[float, float]:
    """(overlap, correlation) of two maps of one protein of more than ``APART`` residues."""
    length = len(ours_LL)
    row, column = torch.triu_indices(length, length, offset=APART).unbind()
    ours_N, theirs_N = ours_LL[row, column], theirs_LL[row, column]
    count = min(length, len(ours_N))
    tops = [set(side_N.topk(count).indices.tolist()) for side_N in (ours_N, theirs_N)]
    overlap = len(tops[0] & tops[1]) / count
    centred = [side_N - side_N.mean() for side_N in (ours_N, theirs_N)]
    scale = (centred[0].norm() * centred[1].norm()).clamp(min=1e-300)
    return overlap, float(centred[0] @ centred[1] / scale)


def contact_figures(
    maps: Sequence[Tensor], structure: Structure | None
) -> dict[str, dict[str, Any]]:
    """Of one protein: precisions of each map, and the agreement of two.

    Args:
        maps: The model's, and its reference's if there is one; (L, L).
        structure: None where it is not known.
    """
    found: dict[str, dict[str, Any]] = {}
    if structure is not None:
        for name, score_LL in zip(("model", "reference"), maps, strict=False):
            found[name] = precisions(score_LL, structure)
    if len(maps) > 1 and len(maps[0]) > APART + 1:
        overlap, correlation = map_agreement(maps[0], maps[1])
        found["agreement"] = {"overlap": overlap, "correlation": correlation}
    return found


def mean_figures(proteins: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's mean over the proteins that have it; None where none has."""
    nested = list(proteins.values())
    keys = dict.fromkeys(key for each in nested for key in each if isinstance(each[key], dict))
    found: dict[str, Any] = {
        key: mean_figures({str(n): each.get(key, {}) for n, each in enumerate(nested)})
        for key in keys
    }
    names = dict.fromkeys(key for each in nested for key in each if key not in keys)
    for name in names:
        values = [each[name] for each in nested if each.get(name) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def _precision(score_N: Tensor, true_N: Tensor, count: int) -> float | None:
    if not bool(true_N.any()):
        return None
    top = score_N.topk(min(count, len(score_N))).indices
    return float(true_N[top].double().mean())
