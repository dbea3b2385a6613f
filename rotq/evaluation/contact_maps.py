"""Contact maps of a masked language model of proteins, read from its attention maps.

    features    A + A^T without the special tokens, average product corrected (APC):
                f_ij = a_ij - a_i. a_.j / a_..
    head        logistic regression on the features of all heads of all layers, as ESM-2 and ESM-1b
                bring it, trained on 20 structures (Rao et al., ICLR 2021)
    average     the mean of all features; asks for no training, so any model has it

Rotations leave attention maps as they are: R1 and R2 are outside of them, R3 turns queries and keys
alike. So both readouts are the original's in exact arithmetic, whatever basis a checkpoint is in.

Shape suffixes: H heads, T tokens, L residues.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rotq.calibration.batches import padded
from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.errors import RotqError
from rotq.evaluation.passes import run_batch
from rotq.models.attention.maps import shown_maps
from rotq.models.families.esm import contact_regression

Readout = Literal["head", "average"]


def check_readout(model: Any, readout: Readout) -> None:
    """Refuse a readout that a model does not have.

    Raises:
        RotqError: it brings no contact head.
    """
    if readout == "head" and contact_regression(model) is None:
        raise RotqError(
            f"{type(model).__name__} has no contact head (a regression on attention maps that "
            "ESM-2 and ESM-1b bring); --readout average reads its maps without one"
        )


@torch.inference_mode()
def contact_map(model: Any, codec: ResidueCodec, sequence: str, readout: Readout) -> Tensor:
    """Scores of all pairs of residues, fp64 (L, L) on the CPU, symmetric; higher is nearer.

    Args:
        model: A masked language model of transformers, on any device.
        codec: Of its tokenizer.
        sequence: Residues; fits the model's positions.
        readout: ``head`` gives probabilities, ``average`` a score.

    Raises:
        RotqError: as ``check_readout``, ``shown_maps`` and ``run_batch``.
    """
    check_readout(model, readout)
    first, regression = len(codec.around[0]), contact_regression(model)
    inside = slice(first, first + len(sequence))
    total_LL = torch.zeros(len(sequence), len(sequence), dtype=torch.float64)
    heads_seen = 0

    def add(map_1HTT: Tensor) -> None:
        nonlocal heads_seen, total_LL
        feature_HLL = _corrected(double(map_1HTT[0, :, inside, inside]))
        after = heads_seen + len(feature_HLL)
        if readout == "head" and regression is not None:
            weight_H = double(regression.weight.cpu())[0, heads_seen:after].to(feature_HLL.device)
            feature_HLL = feature_HLL * weight_H[:, None, None]
        total_LL += feature_HLL.sum(0).cpu()
        heads_seen = after

    batch = padded([codec.encode(sequence)], codec.pad_id, frozenset())
    with shown_maps(model, add):
        run_batch(model, batch)
    if readout == "average" or regression is None:
        return total_LL / heads_seen
    return (total_LL + double(regression.bias).cpu()).sigmoid()


def _corrected(map_HLL: Tensor) -> Tensor:
    sum_HLL = map_HLL + map_HLL.mT
    row_HL1 = sum_HLL.sum(-1, keepdim=True)
    return sum_HLL - row_HL1 * row_HL1.mT / row_HL1.sum(-2, keepdim=True)
