"""Logits of a long window, a few positions at a time: all at once they can outweigh the model.

A window of 8192 tokens has 1.6 GB of fp32 logits over 49152 words, and its last hidden states have
19 MB. Where the output embedding alone makes logits of them, which is tried on the last position,
they are made when they are asked for; elsewhere (softcaps, scaled logits) all are kept.

Shape suffixes: T positions, C positions of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.evaluation.logits import window_logits


class StreamedLogits:
    """Of one window.

    Args:
        model: A causal language model of transformers.
        ids_T: int64 token ids, on any device.

    Raises:
        RotqError: a token id outside the embedding, or numbers that are not finite.
    """

    def __init__(self, model: Any, ids_T: Tensor) -> None:
        self._head = model.get_output_embeddings()
        self._hidden_TE = None if self._head is None else _last_hidden(model, ids_T, self._head)
        self._logits_TV = window_logits(model, ids_T) if self._hidden_TE is None else None

    def __getitem__(self, positions: slice) -> Tensor:
        """(C, V) logits of some positions.

        Raises:
            RotqError: they are not finite.
        """
        if self._logits_TV is not None:
            return self._logits_TV[positions]
        assert self._hidden_TE is not None
        logits_CV: Tensor = self._head(self._hidden_TE[None, positions])[0]
        if not bool(torch.isfinite(logits_CV).all()):
            raise RotqError("the model's logits are not finite")
        return logits_CV


def _last_hidden(model: Any, ids_T: Tensor, head: nn.Module) -> Tensor | None:
    """(T, E), or None where the head does not make the model's logits of it."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    held: list[Tensor] = []

    def hold(_: nn.Module, __: Any, output: Any) -> None:
        held.append(output[0])

    hook = model.base_model.register_forward_hook(hold)
    try:
        last_V = window_logits(model, ids_T, logits_to_keep=1)[-1]
    finally:
        hook.remove()
    if len(held) != 1 or held[0].shape[:2] != (1, len(ids_T)):
        return None
    found_V = head(held[0][:, -1:])[0, -1]
    same = found_V.shape == last_V.shape and torch.allclose(found_V, last_V, rtol=1e-3, atol=1e-3)
    return held[0][0] if same else None
