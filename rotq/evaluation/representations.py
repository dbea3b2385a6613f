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
from rotq.evaluation.contact_maps import contact_map
from rotq.evaluation.contacts import APART, map_agreement
from rotq.evaluation.passes import run_batch
from rotq.models.families.esm import contact_regression


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
        if contact_regression(model) is not None and len(sequence) > APART + 1:
            maps = [contact_map(each, codec, sequence, "head") for each in (model, reference)]
            overlap, correlation = map_agreement(*maps)
            overlaps.append(overlap)
            correlations.append(correlation)
    return Agreement(
        embedding_cosine=cosine / residues,
        contact_overlap=sum(overlaps) / len(overlaps) if overlaps else None,
        contact_correlation=sum(correlations) / len(correlations) if correlations else None,
    )
