"""A calibration's constants on one device, made once for all caches and pools that are there.

Constants are megabytes and caches come and go, one per request; so what is made of a calibration's
constants belongs to the calibration, and lives as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotq.kv.codec import KVCodec
from rotq.ops import KVConstants, SideConstants


class DeviceConstants:
    """What ``KVCalibration.on`` gives.

    Args:
        given: Constants of each layer, on any device.
        device: Where they are needed.
    """

    def __init__(self, given: Mapping[int, KVConstants], device: torch.device) -> None:
        self.given, self.device = given, device
        self._layers: dict[int, KVConstants] = {}
        self._stacks: dict[tuple[int, ...], KVCodec] = {}

    def layer(self, index: int) -> KVConstants:
        """Of one layer; moved when first asked for, as other layers may be needed elsewhere."""
        if index not in self._layers:
            self._layers[index] = _moved(self.given[index], self.device)
        return self._layers[index]

    def stack(self, indices: Sequence[int]) -> KVCodec:
        """The codec of several layers of one kind as of one with all their heads."""
        key = tuple(indices)
        if key not in self._stacks:
            self._stacks[key] = KVCodec(stacked([self.layer(index) for index in key]))
        return self._stacks[key]


def _moved(held: Any, device: torch.device) -> Any:
    """A dataclass of tensors on another device; itself if it is there."""
    changed = {}
    for item in fields(held):
        value = getattr(held, item.name)
        moved = value
        if isinstance(value, Tensor):
            moved = value.to(device)
        elif is_dataclass(value):
            moved = _moved(value, device)
        if moved is not value:
            changed[item.name] = moved
    return replace(held, **changed) if changed else held


def stacked(layers: Sequence[KVConstants]) -> KVConstants:
    """The heads of all, for coding only; what is of no head is the first one's."""
    key = _stacked_side([layer.key for layer in layers])
    return replace(layers[0], key=key, value=_stacked_side([layer.value for layer in layers]))


def _stacked_side(sides: Sequence[SideConstants]) -> SideConstants:
    joined: dict[str, Any] = {
        item.name: torch.cat([getattr(side, item.name) for side in sides])
        for item in fields(SideConstants)
        if isinstance(getattr(sides[0], item.name), Tensor)
    }
    # coding does not need it
    joined["inverse_HDD"] = joined["inverse_HDD"][:0]
    return replace(sides[0], **joined)
