"""What a packed KV cache costs in quality, under the protocol of stepwise decoding.

Windows are run whole, with an attention that reads decoded codes for the history (see
``quantized_history``): the result is that of decoding step by step, at the cost of one forward.
Errors travel on through layers and tokens.

    cosine = mean over positions of the cosine of both models' logits, each less its mean

Shape suffixes: N tokens of the text, B windows, T positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rotq.devices import double
from rotq.evaluation.divergence import Divergence, compare
from rotq.evaluation.logits import CHUNK, summed_nll
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import KVScheme, QuantizedHistory
from rotq.evaluation.streamed_logits import StreamedLogits
from rotq.models.attention.replaced import replaced_attention
from rotq.models.limits import limits_of

PARTS = 8
"""Of a window, whose KL is told apart."""


@dataclass(frozen=True, kw_only=True)
class KVEvaluation:
    """Figures of one scheme on one text."""

    preset: str
    ppl: float
    ppl_ratio: float
    """To the model with an unquantized cache."""
    kl: float
    """KL(unquantized || quantized) in nats per token."""
    kl_p50: float
    """Half of the positions have no more, as the next two: 99 %, 99.9 %."""
    kl_p99: float
    kl_p999: float
    kl_by_position: list[float]
    """Mean KL of each eighth of a window's scored positions, from its start."""
    top1: float
    """Share of positions where both most likely tokens are the same."""
    flips: float
    """Share of positions where they differ."""
    cosine: float
    bits_per_element: float
    """All in at the window's length: codes, norms, residuals, and what is kept whole."""
    bytes_per_token: float
    """Packed bytes of a token that is not kept whole, all layers."""
    attention_error: list[float]
    """Relative squared error of each layer's attention output, first layer first."""
    reference_ppl: float
    tokens: int
    """Positions that were scored, over all windows."""
    sinks: int
    recent: int
    chunk: int
    """Tokens of a forward pass, which see each other whole; 1 is decoding."""
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def bits_per_element(scheme: KVScheme, length: int, dtype: torch.dtype) -> float:
    """Bits per key or value element of a sequence of ``length``, with what is kept whole.

    Tokens kept whole count at ``dtype``; constants (one copy per model) and page tables do not.
    """
    whole = min(length, scheme.sinks + scheme.recent)
    return (scheme.stored_bits * (length - whole) + 8 * dtype.itemsize * whole) / length


@dataclass
class _Sums:
    """Running sums of one scheme over windows."""

    nll: float = 0.0
    cosine: float = 0.0
    divergence: Divergence = field(default_factory=Divergence)

    def add(self, reference_CV: Tensor, logits_CV: Tensor, target_C: Tensor) -> None:
        """Some positions of a window."""
        self.nll += summed_nll(logits_CV, target_C)
        self.cosine += _summed_cosine(reference_CV, logits_CV)
        self.divergence += compare(reference_CV, logits_CV, chunk=CHUNK)

    def by_position(self, num_windows: int) -> list[float]:
        """Mean KL of parts of the windows, first positions first."""
        kl_BT = self.divergence.kl_N.view(num_windows, -1)
        return [float(part.mean()) for part in kl_BT.tensor_split(PARTS, dim=1) if part.numel()]


@torch.inference_mode()
def evaluate_kv(
    model: Any,
    ids_N: Tensor,
    schemes: Sequence[KVScheme],
    *,
    protocol: Protocol,
    chunk: int = 1,
    on_window: Callable[[int, int], None] | None = None,
) -> list[KVEvaluation]:
    """Score a text with each scheme, and with an unquantized cache; windows do not overlap.

    They are cut to the positions of the model.

    Args:
        model: A causal language model of transformers.
        ids_N: int64 token ids of the whole text.
        schemes: Each with its constants for this model.
        protocol: Without stride.
        chunk: Tokens of a forward pass, which see each other whole; 1 is decoding.
        on_window: Called with windows done and windows in all.

    Raises:
        RotqError: text too short, a token id outside the vocabulary, an attention that is not
            supported, or logits that are not finite.
    """
    limits = limits_of(model)
    protocol = protocol.within(limits)
    ids_BT = protocol.cut(ids_N)
    limits.check(ids_BT)
    reference_nll, first = 0.0, protocol.first_scored(0)
    sums = [_Sums() for _ in schemes]
    histories = [QuantizedHistory(scheme, step=chunk) for scheme in schemes]
    for window, ids_T in enumerate(ids_BT):
        reference = StreamedLogits(model, ids_T)
        scored = [
            slice(at, min(at + CHUNK, len(ids_T) - 1))
            for at in range(first - 1, len(ids_T) - 1, CHUNK)
        ]
        for part in scored:
            reference_CV = reference[part]
            target_C = ids_T[part.start + 1 : part.stop + 1].to(reference_CV.device)
            reference_nll += summed_nll(reference_CV, target_C)
        for total, history in zip(sums, histories, strict=True):
            with replaced_attention(model, history):
                found = StreamedLogits(model, ids_T)
            for part in scored:
                logits_CV = found[part]
                target_C = ids_T[part.start + 1 : part.stop + 1].to(logits_CV.device)
                total.add(reference[part], logits_CV, target_C)
        if on_window is not None:
            on_window(window + 1, len(ids_BT))
    tokens = ids_BT.numel() - first * len(ids_BT)
    return [
        KVEvaluation(
            preset=scheme.name,
            ppl=math.exp(total.nll / tokens),
            ppl_ratio=math.exp((total.nll - reference_nll) / tokens),
            kl=total.divergence.kl,
            **total.divergence.percentiles(),
            kl_by_position=total.by_position(len(ids_BT)),
            top1=total.divergence.top1,
            flips=1 - total.divergence.top1,
            cosine=total.cosine / tokens,
            bits_per_element=bits_per_element(scheme, protocol.seq_len, model.dtype),
            bytes_per_token=scheme.stored_bits * scheme.elements / 8,
            attention_error=history.attention_error,
            reference_ppl=math.exp(reference_nll / tokens),
            tokens=tokens,
            sinks=scheme.sinks,
            recent=scheme.recent,
            chunk=chunk,
            protocol=f"{_passes(chunk)}; {protocol.describe(len(ids_BT))}",
        )
        for scheme, total, history in zip(schemes, sums, histories, strict=True)
    ]


def _passes(chunk: int) -> str:
    return "stepwise cache" if chunk == 1 else f"cache in passes of {chunk} tokens"


def _summed_cosine(reference_TV: Tensor, logits_TV: Tensor) -> float:
    total = 0.0
    for first_CV, second_CV in zip(reference_TV.split(CHUNK), logits_TV.split(CHUNK), strict=True):
        first_CV, second_CV = first_CV.float(), second_CV.float()
        first_CV = first_CV - first_CV.mean(dim=-1, keepdim=True)
        second_CV = second_CV - second_CV.mean(dim=-1, keepdim=True)
        total += float(double(F.cosine_similarity(first_CV, second_CV, dim=-1)).sum())
    return total
