"""Whether a quantized protein model still sees the same structure: embeddings and contact maps.

    cosine        mean over residues of the cosine of both models' last hidden states
    overlap       share of the reference's top L contacts, L residues, at least 6 apart, that are
                  among the model's top L
    correlation   Pearson, of the contact probabilities at least 6 apart

A rotated checkpoint's hidden states are in another basis, and the gain and bias of the final norm
are in the head; ``OriginalBasis`` takes them back. Contact maps need no such thing.

Shape suffixes: B sequences, T positions, D hidden size, M residues, L residues of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rotq.calibration.batches import padded
from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.evaluation.passes import run_batch
from rotq.models.attention import dispatch
from rotq.models.limits import embedding_device

APART = 6
"""Least distance along the chain of what counts as a contact."""


@dataclass(frozen=True, kw_only=True)
class OriginalBasis:
    """Leads hidden states back to the original basis: h <- (h R^T) g + c."""

    R_DD: Tensor
    gain_D: Tensor
    """Gain of the reference's final norm."""
    added_D: Tensor | None

    def restore(self, hidden_MD: Tensor) -> Tensor:
        """Hidden states as the unrotated model has them; fp64."""
        hidden_MD = double(hidden_MD)
        back_MD = hidden_MD @ self.R_DD.T.to(hidden_MD.device) * double(self.gain_D)
        return back_MD if self.added_D is None else back_MD + double(self.added_D)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near a model's hidden states and contact maps are to its reference's."""

    embedding_cosine: float
    contact_overlap: float | None
    """None where the model has no contact head, or no sequence is long enough."""
    contact_correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def compare_representations(
    model: Any,
    reference: Any,
    sequences: Sequence[str],
    codec: ResidueCodec,
    *,
    basis: OriginalBasis | None = None,
) -> Agreement:
    """Run both models on each sequence.

    Args:
        model: A masked language model of transformers.
        reference: The original.
        sequences: Residues; one is run at a time.
        codec: Of the tokenizer.
        basis: Of the model's hidden states, where it is not the reference's.

    Raises:
        RotqError: as ``passes.run_batch``.
    """
    cosine, residues = 0.0, 0
    overlaps: list[float] = []
    correlations: list[float] = []
    first = len(codec.around[0])
    for sequence in sequences:
        batch = padded([codec.encode(sequence)], codec.pad_id, frozenset())
        ours_MD, theirs_MD = (
            run_batch(each, batch, output_hidden_states=True).hidden_states[-1][0][
                first : len(sequence) + first
            ]
            for each in (model, reference)
        )
        restored_MD = double(ours_MD) if basis is None else basis.restore(ours_MD)
        cosine += float(F.cosine_similarity(restored_MD, double(theirs_MD), dim=-1).sum())
        residues += len(sequence)
        if hasattr(model, "predict_contacts") and len(sequence) > APART + 1:
            maps = [_contacts(each, batch.ids_BT) for each in (model, reference)]
            overlap, correlation = _map_agreement(*maps)
            overlaps.append(overlap)
            correlations.append(correlation)
    return Agreement(
        embedding_cosine=cosine / residues,
        contact_overlap=sum(overlaps) / len(overlaps) if overlaps else None,
        contact_correlation=sum(correlations) / len(correlations) if correlations else None,
    )


def _contacts(model: Any, ids_BT: Tensor) -> Tensor:
    """(L, L) probabilities; attention maps come from eager attention only."""
    ids_BT = ids_BT.to(embedding_device(model))
    with dispatch.used(model, "eager"):
        found: Tensor = model.predict_contacts(ids_BT, torch.ones_like(ids_BT))[0]
    return found.cpu().double()


def _map_agreement(ours_LL: Tensor, theirs_LL: Tensor) -> tuple[float, float]:
    length = len(ours_LL)
    row, column = torch.triu_indices(length, length, offset=APART).unbind()
    ours_N, theirs_N = ours_LL[row, column], theirs_LL[row, column]
    count = min(length, len(ours_N))
    tops = [set(side_N.topk(count).indices.tolist()) for side_N in (ours_N, theirs_N)]
    overlap = len(tops[0] & tops[1]) / count
    centred = [side_N - side_N.mean() for side_N in (ours_N, theirs_N)]
    scale = (centred[0].norm() * centred[1].norm()).clamp(min=1e-300)
    return overlap, float(centred[0] @ centred[1] / scale)
