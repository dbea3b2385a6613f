"""Code the few tokens of a decode step for all layers at once.

Coding one token takes some sixty small operations on a CPU, and two launches on a GPU, which cost
the same for one layer and for all. Layers of the same format and rotation are therefore coded as
one with more heads, after the forward pass: until then no other token attends to its tokens. On a
GPU their pages are parts of one memory, so that one kernel writes to all of them.

Shape suffixes: B sequences, E columns to be coded, H KV heads of all layers together, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rotq.autocast import switched_off
from rotq.kv.cache.encoded_layer import EncodedLayer, stored_outgrown
from rotq.kv.cache.layout import Layout
from rotq.kv.cache.pages import JointPages
from rotq.kv.calibration.device_constants import stacked
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.codec import KVCodec
from rotq.kv.norm_range import outgrown
from rotq.ops import KVConstants, SideConstants, encode_kv, pack_kv, write_tokens

JOINED = ("cuda",)
"""Devices on which layers have their pages in one memory."""


class BatchedEncoder:
    """Codes the tokens that layers of one kind left in ``uncoded``.

    Args:
        layers: Of one window, format and rotation, on one device. One layer alone may have any.
        codec: Of all their heads; None for one layer alone.
        given: Of each layer, what the codec was made of.
    """

    def __init__(
        self, layers: Sequence[EncodedLayer], codec: KVCodec | None, given: Sequence[KVConstants]
    ) -> None:
        self.layers, self.codec, self.given = layers, codec, given
        self.joint: JointPages | None = None

    def encode(self) -> None:
        """Write tokens into the layers' pages, if there are any."""
        with switched_off(_device(self.layers[0])):
            if self.codec is None:
                self.layers[0].encode_rest()
            else:
                self._encode_together(self.codec)

    def _encode_together(self, codec: KVCodec) -> None:
        if _device(self.layers[0]).type in JOINED:
            # from the prompt on, as kernels are compiled anew for pages that are parts of others
            self.join()
        tokens = [layer.uncoded for layer in self.layers if layer.uncoded is not None]
        visible = self.layers[0].visible
        if not tokens or visible is None:
            return
        if any(a.constants is not b for a, b in zip(self.layers, self.given, strict=True)):
            self.given = [layer.constants for layer in self.layers]
            self.codec = codec = KVCodec(stacked(self.given))
        layout = visible.layout
        k_BHED = torch.cat([k for k, _ in tokens], dim=1)
        v_BHED = torch.cat([v for _, v in tokens], dim=1)
        write = self._write_joint if k_BHED.device.type in JOINED else self._write
        flag = write(codec, layout, k_BHED, v_BHED)
        for layer in self.layers:
            layer.uncoded, layer.outgrown = None, flag

    def join(self) -> JointPages:
        """Put the pages of all layers into one memory, if they are not there."""
        stores = [layer.store for layer in self.layers]
        if self.joint is None or self.joint.stores != stores:
            assert all(store is not None for store in stores)
            self.joint = JointPages([store for store in stores if store is not None])
        return self.joint

    def _write_joint(
        self, codec: KVCodec, layout: Layout, k_BHED: Tensor, v_BHED: Tensor
    ) -> Tensor | None:
        """Into the pages of all layers at once; whether a norm did not fit."""
        pages, slot_BE = self.join().pages, layout.encode_slot_BE
        encode_kv(k_BHED, v_BHED, layout.encode_position_BE, slot_BE, codec.constants, pages)
        return stored_outgrown(pages, slot_BE)

    def _write(
        self, codec: KVCodec, layout: Layout, k_BHED: Tensor, v_BHED: Tensor
    ) -> Tensor | None:
        """Into the pages of each layer; whether a norm did not fit."""
        form = codec.constants.format
        codes = codec.encode(k_BHED, v_BHED, layout.encode_position_BE)
        pages = [layer.pages for layer in self.layers]
        written = (
            (pack_kv(codes.k_codes_BHTD, form.k_bits), [item.k_codes for item in pages]),
            (pack_kv(codes.v_codes_BHTD, form.v_bits), [item.v_codes for item in pages]),
            (codes.k_norm_BHT, [item.k_norm for item in pages]),
            (codes.v_norm_BHT, [item.v_norm for item in pages]),
        )
        write_tokens(written, layout.encode_slot_BE, form.page_size)
        there_BE = layout.encode_slot_BE >= 0
        norms = [norm for norm in (codes.k_norm_BHT, codes.v_norm_BHT) if norm is not None]
        return torch.stack([outgrown(norm, there_BE) for norm in norms]).any() if norms else None

    def constant_bytes(self) -> int:
        """Bytes of the constants that are held once more, for all layers together."""
        if self.codec is None:
            return 0
        sides = (self.codec.constants.key, self.codec.constants.value)
        held = [getattr(side, item.name) for side in sides for item in fields(side)]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))


def batched_encoders(
    layers: Sequence[EncodedLayer], calibration: KVCalibration
) -> list[BatchedEncoder]:
    """One for the layers of each kind; layers with a residual have one each.

    Args:
        layers: All of a model, in order, where their memory is.
        calibration: Theirs.
    """
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(index, layer), []).append(index)
    found = []
    for indices in kinds.values():
        codec, shared = None, calibration.on(_device(layers[indices[0]]))
        if len(indices) > 1:
            codec = shared.stack(indices)
        given = [shared.layer(index) for index in indices]
        found.append(BatchedEncoder([layers[index] for index in indices], codec, given))
    return found


def _kind(index: int, layer: EncodedLayer) -> tuple[Any, ...]:
    """Equal for layers that can be coded together."""
    constants, freq_R = layer.constants, layer.constants.inv_freq_R
    return (
        layer.window,
        _device(layer),
        constants.format,
        constants.mean,
        _settings(constants.key),
        _settings(constants.value),
        None if freq_R is None else (constants.rotary_scale, *freq_R.tolist()),
        index if constants.format.residual != "none" else None,
    )


def _device(layer: EncodedLayer) -> torch.device:
    return layer.constants.key.base_H.device


def _settings(side: SideConstants) -> tuple[Any, ...]:
    """What is no tensor, and where there is none."""
    values = [getattr(side, item.name) for item in fields(side)]
    return tuple(None if isinstance(value, Tensor) else (value,) for value in values)
