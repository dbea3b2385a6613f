"""ESM-2 token by token, with a packed cache, as TurboESM runs it (arXiv 2603.26110).

transformers' ESM has no cache any more, but it hands unknown keywords on to its attention, and with
them the cache; see ``attention``. The loop is ours, inside ``models.families.esm.as_decoder``.

    with as_decoder(model):
        logits_BTV = decode(model, ids_BT, EsmPackedCache(model, calibration))

Shape suffixes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from rotq.errors import RotqError
from rotq.kv.cache import attention
from rotq.kv.cache.packed_cache import PackedCache


class EsmPackedCache(PackedCache):
    """A ``PackedCache`` for an ESM-2 inside ``as_decoder``; no padding."""

    def _try_out(self, model: nn.Module, decoder: nn.Module) -> None:
        """Nothing: the family is known to work."""

    def begin(self, decoder: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """As ``PackedCache.begin``; ESM's embeddings must not see the stand-in for a mask.

        Raises:
            RotqError: a mask is given, or the pass cannot be served.
        """
        if given.get("attention_mask") is not None:
            raise RotqError("ESM-2 is decoded without padding")
        return super().begin(decoder, given) | {"attention_mask": None}


class Int8Layer(DynamicLayer):
    """Keys and values as int8 with one fp16 scale for each token and head: the plain baseline."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round and store the fresh tokens; gives back all, dequantized, the fresh ones as given.

        Args:
            key_states: (B, H, T, D), after RoPE.
            value_states: The same shape.
        """
        fresh = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stored = [_rounded(side) for side in fresh]
            self.keys, self.values = self.stored[0][0], self.stored[1][0]
            return fresh
        before = [q.to(s.dtype) * s for q, s in self.stored]
        for index, side in enumerate(fresh):
            new = _rounded(side)
            q, s = self.stored[index]
            self.stored[index] = (torch.cat((q, new[0]), dim=2), torch.cat((s, new[1]), dim=2))
        self.keys, self.values = self.stored[0][0], self.stored[1][0]
        k, v = (torch.cat((b.to(f.dtype), f), dim=2) for b, f in zip(before, fresh, strict=True))
        return k, v

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for pair in self.stored for tensor in pair)


def int8_cache(num_layers: int) -> Cache:
    """An INT8 cache for a model of so many layers."""
    return Cache(layers=[Int8Layer() for _ in range(num_layers)])


@torch.inference_mode()
def decode(model: Any, ids_BT: Tensor, cache: Cache | None, *, prefix: int = 1) -> Tensor:
    """Logits of every position, (B, T, V), the first ``prefix`` tokens in one pass.

    Args:
        model: An ESM-2 inside ``as_decoder``.
        ids_BT: int64, without padding.
        cache: Empty; None takes a dense one.
        prefix: Tokens of the first pass, whose attention sees their own keys unrounded.

    Raises:
        RotqError: the cache cannot serve the model.
    """
    attention.register()
    model.set_attn_implementation(attention.NAME)
    cache = DynamicCache() if cache is None else cache
    position_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    bounds = [0, *range(prefix, ids_BT.shape[1] + 1)]
    found = []
    for start, end in pairwise(bounds):
        output = model(
            input_ids=ids_BT[:, start:end],
            position_ids=position_1T[:, start:end],
            past_key_values=cache,
        )
        found.append(output.logits)
    return torch.cat(found, dim=1)


def _rounded(x_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes, and fp16 scales (B, H, T, 1)."""
    scale = (x_BHTD.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
    codes = (x_BHTD.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return codes, scale
