"""Logits of one window, and the likelihood of a text under them.

Shape suffixes: T positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError
from rotq.models.limits import embedding_device, vocabulary_of

CHUNK = 256
"""Positions whose log-probabilities are held in fp32 at a time."""


def window_logits(model: Any, ids_T: Tensor, **options: Any) -> Tensor:
    """(T, V) logits of one window, on the device the model answers on.

    Args:
        model: A causal language model of transformers.
        ids_T: int64 token ids, on any device.
        options: Of the model's forward.

    Raises:
        RotqError: a token id outside the embedding, or logits that are not finite.
    """
    device, num_embeddings = embedding_device(model), vocabulary_of(model)
    if int(ids_T.max()) >= num_embeddings:
        raise RotqError(
            f"token id {int(ids_T.max())} is outside the model's {num_embeddings} embeddings; "
            "is the tokenizer the model's own?"
        )
    logits_TV: Tensor = model(input_ids=ids_T[None].to(device), use_cache=False, **options).logits[
        0
    ]
    if not bool(torch.isfinite(logits_TV).all()):
        raise RotqError("the model's logits are not finite")
    return logits_TV


def summed_nll(logits_TV: Tensor, target_T: Tensor) -> float:
    """Summed negative log-likelihood in nats; softmax in fp32, sum in fp64."""
    total = 0.0
    chunks = zip(logits_TV.split(CHUNK), target_T.split(CHUNK), strict=True)
    for logits_CV, target_C in chunks:
        nll_C = F.cross_entropy(logits_CV.float(), target_C, reduction="none")
        total += float(double(nll_C).sum())
    return total
