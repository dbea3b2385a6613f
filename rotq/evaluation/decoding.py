"""What a cache costs an ESM-2 that is run token by token, against the same loop without rounding.

    cosine        mean over positions behind the prefix of the cosine of both runs' logits, centred
    one pass      exp(-mean log p(x_t | x_0 .. x_t)): the token is seen, so it is low; only its
                  ratio to the dense cache's means something

Shape suffixes: T positions, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from rotq.calibration.residues import ResidueCodec
from rotq.kv.cache.esm import EsmPackedCache, decode, int8_cache
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.statistics import collect
from rotq.kv.presets import KVSpec
from rotq.models.families.esm import as_decoder
from rotq.models.limits import embedding_device, limits_of

PAPER_COSINES = {
    "short-peptide": 0.9603,
    "transmembrane": 0.9710,
    "active-site": 0.9641,
    "disordered": 0.9757,
}
"""What TurboESM's README has at 4.5 bits on ESM-2 650M, one protein of each kind: insulin's B chain
(32 residues), a transmembrane protein (39), an enzyme (51), a disordered one (165)."""


@dataclass(frozen=True, kw_only=True)
class DecodingEvaluation:
    """Figures of one cache on one set of sequences."""

    cache: str
    cosine: float
    worst_cosine: float
    """Of the sequence with the lowest mean over its positions."""
    one_pass: float
    ratio: float
    """``one_pass`` as a multiple of the dense cache's."""
    bytes: int
    """Held at the end of the longest sequence."""
    bits_per_element: float
    """``bytes`` in bits, for each key and value element."""
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def evaluate_decoding(
    model: Any,
    sequences: Sequence[str],
    codec: ResidueCodec,
    caches: dict[str, Callable[[], Cache]],
    *,
    prefix: int = 1,
) -> list[DecodingEvaluation]:
    """Decode each sequence with a dense cache, and with each of ``caches``.

    Args:
        model: An ESM-2 of transformers.
        sequences: Residues.
        codec: Of the tokenizer.
        caches: By name: gives an empty one.
        prefix: Tokens of the first pass, in which nothing is read from a cache; not scored.
    """
    sums = {name: _Sums() for name in ("dense", *caches)}
    with as_decoder(model):
        for sequence in sequences:
            ids_T = torch.tensor(codec.encode(sequence), device=embedding_device(model))
            dense_TV = decode(model, ids_T[None], None, prefix=prefix)[0]
            width = 2 * model.config.num_hidden_layers * model.config.hidden_size
            elements = width * len(ids_T)
            sums["dense"].add(
                dense_TV, dense_TV, ids_T, prefix, elements * dense_TV.dtype.itemsize, elements
            )
            for name, make in caches.items():
                cache = make()
                logits_TV = decode(model, ids_T[None], cache, prefix=prefix)[0]
                sums[name].add(dense_TV, logits_TV, ids_T, prefix, held_bytes(cache), elements)
    return [total.finish(name, sums["dense"]) for name, total in sums.items()]


def packed_caches(
    model: Any,
    specs: Sequence[KVSpec],
    ids_BT: Tensor | None,
    *,
    on_note: Callable[[str], object] = warnings.warn,
) -> dict[str, Callable[[], Cache]]:
    """Caches by name of their scheme.

    Args:
        model: An ESM-2 of transformers.
        specs: Schemes of packed caches.
        ids_BT: Windows of one length that they are calibrated on; None where none needs any.
        on_note: As for ``calibrate``.

    Raises:
        RotqError: a token id outside the model's embedding, or see ``calibrate``.
    """
    found = [data_oblivious(model.config, spec) for spec in specs if not spec.needs_calibration]
    fitted = [spec for spec in specs if spec.needs_calibration]
    if fitted and ids_BT is not None:
        limits_of(model).check(ids_BT)
        ids_BT = ids_BT.to(embedding_device(model))
        with as_decoder(model):
            seen = collect(model, ids_BT, sinks=max(spec.sinks for spec in fitted))
            for spec in fitted:
                found.append(calibrate(model, ids_BT, spec, statistics=seen, on_note=on_note))
    return {each.spec.name: partial(EsmPackedCache, model, each) for each in found}


def held_bytes(cache: Cache) -> int:
    """Bytes of a packed or an INT8 cache that grow with the tokens."""
    if isinstance(cache, PackedCache):
        return cache.report().total
    return sum(layer.nbytes for layer in cache.layers)


def baselines(num_layers: int) -> dict[str, Callable[[], Cache]]:
    """What TurboESM's paper does not compare with, besides the dense cache."""
    return {"int8": lambda: int8_cache(num_layers)}


class _Sums:
    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.total = self.nll = 0.0
        self.tokens = self.bytes = self.elements = 0

    def add(
        self,
        dense_TV: Tensor,
        logits_TV: Tensor,
        ids_T: Tensor,
        prefix: int,
        num_bytes: int,
        elements: int,
    ) -> None:
        first, second = (
            side_TV[prefix:].double() - side_TV[prefix:].double().mean(-1, keepdim=True)
            for side_TV in (dense_TV, logits_TV)
        )
        cosine_T = F.cosine_similarity(first, second, dim=-1)
        self.cosines.append(float(cosine_T.mean()))
        self.total += float(cosine_T.sum())
        log_p_TV = logits_TV[prefix:].double().log_softmax(-1)
        self.nll -= float(log_p_TV.gather(1, ids_T[prefix:, None]).sum())
        self.tokens += len(cosine_T)
        if elements > self.elements:
            self.bytes, self.elements = num_bytes, elements

    def finish(self, name: str, dense: _Sums) -> DecodingEvaluation:
        return DecodingEvaluation(
            cache=name,
            cosine=self.total / self.tokens,
            worst_cosine=min(self.cosines),
            one_pass=math.exp(self.nll / self.tokens),
            ratio=math.exp((self.nll - dense.nll) / self.tokens),
            bytes=self.bytes,
            bits_per_element=8 * self.bytes / self.elements,
            tokens=self.tokens,
        )
