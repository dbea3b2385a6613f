"""A calibration's constants where and how they are needed, shared by all caches that use it.

Constants are megabytes and caches come and go, one per request; so what is made of a calibration's
transforms is kept while anyone uses it, and found again by the identity of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rotq.kv.codec import KVCodec
from rotq.ops import KVConstants, SideConstants


class Stack:
    """The constants of several layers as those of one with all their heads.

    Args:
        transforms: Of these layers; held, so that they can be told by identity.
    """

    def __init__(self, transforms: Sequence[KVConstants]) -> None:
        self.transforms = transforms
        key = _stacked([transform.key for transform in transforms])
        value = _stacked([transform.value for transform in transforms])
        self.codec = KVCodec(replace(transforms[0], key=key, value=value))


_STACKS: WeakValueDictionary[tuple[int, ...], Stack] = WeakValueDictionary()


def stack(transforms: Sequence[KVConstants]) -> Stack:
    """The constants of several layers as one, the same for all who ask."""
    identity = tuple(map(id, transforms))
    found = _STACKS.get(identity) or Stack(transforms)
    _STACKS[identity] = found
    return found


def _stacked(sides: Sequence[SideConstants]) -> SideConstants:
    """One side with the heads of all; its settings are those of each."""
    joined: dict[str, Any] = {
        item.name: torch.cat([getattr(side, item.name) for side in sides])
        for item in fields(SideConstants)
        if isinstance(getattr(sides[0], item.name), Tensor)
    }
    # coding does not need it
    joined["inverse_HDD"] = joined["inverse_HDD"][:0]
    return replace(sides[0], **joined)


_ELSEWHERE: WeakValueDictionary[tuple[int, torch.device], KVConstants] = WeakValueDictionary()


def on(device: torch.device, given: KVConstants) -> KVConstants:
    """Constants on a device, the same for all who ask.

    Who holds what comes back must hold ``given`` too, so that its identity stays its own.
    """
    moved = _ELSEWHERE.get((id(given), device))
    if moved is None:
        moved = _moved(given, device)
        if moved is not given:
            _ELSEWHERE[id(given), device] = moved
    return moved


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
