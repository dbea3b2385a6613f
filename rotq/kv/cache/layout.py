"""Where one forward pass finds its tokens, and where it puts them.

Shape suffixes: B sequences, T fresh columns, N dense columns, E columns to be coded, J pages of a
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes; a tensor of any dtype may begin at multiples of it."""

NO_TOKEN = -1
"""Number, position and slot of padding."""


@dataclass(kw_only=True)
class Layout:
    """What attending and coding need to know, the same for several layers; on one device."""

    query_position_BT: Tensor
    """int32; NO_TOKEN for padding, whose attention is zero."""
    page_table_BJ: Tensor
    length_B: Tensor
    """int32 packed tokens before the pass, in the pages of the table."""
    start_B: Tensor
    """int32 position of the first of them."""
    dense_position_BN: Tensor
    """int32 positions of the tokens that are attended to whole, NO_TOKEN where there is none."""
    encode_position_BE: Tensor
    """int32 positions of the columns to be coded."""
    encode_slot_BE: Tensor
    """int64 page * page_size + offset; NO_TOKEN for columns that are not coded."""
    elsewhere: dict[torch.device, Self] = field(default_factory=dict, repr=False)
    """Copies on other devices, which ``to`` has made."""

    def to(self, device: torch.device) -> Self:
        """Itself, or a copy on another device, made once for all layers there."""
        if self.length_B.device == device:
            return self
        if device not in self.elsewhere:
            held = {item.name: getattr(self, item.name) for item in fields(self)}
            tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            moved: dict[str, Any] = dict(
                zip(tensors, together(tensors.values(), device), strict=True)
            )
            self.elsewhere[device] = replace(self, **moved)
        return self.elsewhere[device]


def together(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on a device, by one copy that a GPU makes when it comes to it.

    A copy of each would take a call, and wait for the device, each.
    """
    held = [tensor.contiguous() for tensor in tensors]
    ends = list(accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in held))
    pinned = device.type == "cuda"
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=pinned)
    begins = [0, *ends]
    for tensor, begin in zip(held, begins, strict=False):
        buffer[begin : begin + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(held, begins, strict=False)
    ]
