"""Code the few tokens of a decode step for all layers at once.

Coding one token takes some sixty small operations, which on a CPU cost the same for one layer and
for all. Layers of the same format and rotation are therefore coded as one with more heads, after
the forward pass: until then no other token attends to its tokens.

Shape suffixes: B sequences, E columns to be coded, H KV heads of all layers together, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rotq.kv.cache.encoded_layer import EncodedLayer
from rotq.kv.calibration.constants import Stack, stack
from rotq.ops import SideConstants, pack_kv, write_tokens


class Appender:
    """Codes the tokens that layers of one kind left in ``uncoded``.

    Args:
        layers: Of one window, format and rotation, on one device. One layer alone may have any.
    """

    def __init__(self, layers: Sequence[EncodedLayer]) -> None:
        self.layers = layers
        self.stack: Stack | None = None
        if len(layers) > 1:
            self.stack = stack([layer.constants for layer in layers])

    def append(self) -> None:
        """Write tokens into the layers' pages, if there are any."""
        if self.stack is None:
            self.layers[0].encode_rest()
            return
        tokens = [layer.uncoded for layer in self.layers if layer.uncoded is not None]
        visible = self.layers[0].visible
        if not tokens or visible is None:
            return
        layout, codec = visible.layout, self.stack.codec
        form = codec.transform.format
        k_BHED = torch.cat([k for k, _ in tokens], dim=1)
        v_BHED = torch.cat([v for _, v in tokens], dim=1)
        codes = codec.encode(k_BHED, v_BHED, layout.encode_position_BE)
        pages = [layer.pages for layer in self.layers]
        written = (
            (pack_kv(codes.k_codes_BHTD, form.k_bits), [item.k_codes for item in pages]),
            (pack_kv(codes.v_codes_BHTD, form.v_bits), [item.v_codes for item in pages]),
            (codes.k_norm_BHT, [item.k_norm for item in pages]),
            (codes.v_norm_BHT, [item.v_norm for item in pages]),
        )
        write_tokens(written, layout.encode_slot_BE, form.page_size)
        for layer in self.layers:
            layer.uncoded = None

    def constant_bytes(self) -> int:
        """Bytes of the constants that are held once more, for all layers together."""
        if self.stack is None:
            return 0
        sides = (self.stack.codec.transform.key, self.stack.codec.transform.value)
        held = [getattr(side, item.name) for side in sides for item in fields(side)]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))


def appenders(layers: Sequence[EncodedLayer]) -> list[Appender]:
    """One for the layers of each kind; layers with a residual have one each."""
    kinds: dict[Any, list[EncodedLayer]] = {}
    for index, layer in enumerate(layers):
        constants, freq = layer.constants, layer.constants.inv_freq_R
        kind = (
            layer.window,
            constants.key.base_H.device,
            constants.format,
            constants.mean,
            _settings(constants.key),
            _settings(constants.value),
            None if freq is None else (constants.rotary_scale, *freq.tolist()),
            index if constants.format.residual != "none" else None,
        )
        kinds.setdefault(kind, []).append(layer)
    return [Appender(found) for found in kinds.values()]


def _settings(side: SideConstants) -> tuple[Any, ...]:
    """What is no tensor, and where there is none."""
    values = [getattr(side, item.name) for item in fields(side)]
    return tuple(None if isinstance(value, Tensor) else (value,) for value in values)
