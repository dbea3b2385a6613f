"""Where one forward pass finds its tokens, and where it puts them.

Shape suffixes: B sequences, T fresh columns, N dense columns, E columns to be coded, J pages of a
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from rotq.ops import WHOLE_TOKENS, Extent

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
    extent: Extent | None = None
    """Of a long chunk before which everything is seen; see ``extent_of``."""
    elsewhere: dict[torch.device, Self] = field(default_factory=dict, repr=False)
    """Copies on other devices, which ``to`` has made."""
    worked_out: dict[int, Any] | None = field(default_factory=dict, repr=False)
    """What attention keeps here for the layers that follow, see ``KVHistory``; None where the
    tensors get other contents later."""

    def to(self, device: torch.device) -> Self:
        """Itself, or a copy on another device, made once for all layers there."""
        if self.length_B.device == device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = self.of(together(self.tensors(), device))
        return self.elsewhere[device]

    def tensors(self) -> list[Tensor]:
        """In the order of the fields."""
        held = (getattr(self, item.name) for item in fields(self))
        return [value for value in held if isinstance(value, Tensor)]

    def of(self, tensors: Sequence[Tensor]) -> Self:
        """The same with other tensors, in the order of ``tensors``."""
        names = [item.name for item in fields(self)]
        names = [name for name in names if isinstance(getattr(self, name), Tensor)]
        moved: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return replace(self, worked_out=None, **moved)


def extent_of(
    query_position_BT: Tensor, length_B: Tensor, dense_position_BN: Tensor
) -> Extent | None:
    """What the host knows of a long chunk whose queries see all before them; None of others.

    Args:
        query_position_BT: As those of ``Layout``, on the CPU.
        length_B: See there.
        dense_position_BN: See there; the last columns are the chunk's.
    """
    T = query_position_BT.shape[1]
    if T < WHOLE_TOKENS or (length_B != length_B[0]).any():
        return None
    fresh_BT, before_BN = query_position_BT >= 0, dense_position_BN[:, :-T] >= 0
    skipped = int((~before_BN.any(0)).long().cumprod(0).sum())
    # padding in front, or among tokens
    has_holes = (fresh_BT[:, 1:] & ~fresh_BT[:, :-1]).any() or not before_BN[:, skipped:].all()
    if has_holes:
        return None
    end = 1 + int(query_position_BT.max())
    return Extent(packed=int(length_B[0]), skipped=skipped, end=end)


def together(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on a device, by one copy that a GPU makes when it comes to it.

    A copy of each would take a call, and wait for the device, each.
    """
    held = [tensor.contiguous() for tensor in tensors]
    return _parts(_in_a_row(held, device).to(device, non_blocking=True), held)


class Held:
    """Tensors on a device that stay where they are, for steps of one shape that read them there.

    Args:
        tensors: On the CPU, of the shapes and dtypes that all steps have.
        device: Where they are held.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._buffer = _in_a_row(tensors, device).to(device, copy=True)
        self.tensors = _parts(self._buffer, tensors)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Give them another content, by one copy that a GPU makes when it comes to it."""
        held = [tensor.contiguous() for tensor in tensors]
        self._buffer.copy_(_in_a_row(held, self._buffer.device), non_blocking=True)


def _begins(tensors: Iterable[Tensor]) -> list[int]:
    """Where each begins in a row of them, and where the row ends."""
    ends = accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors)
    return [0, *ends]


def _in_a_row(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """uint8, on the CPU: contiguous tensors one behind the other, for a copy to the device."""
    begins = _begins(tensors)
    buffer = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, begin in zip(tensors, begins, strict=False):
        buffer[begin : begin + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
    return buffer


def _parts(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What lies in a row of tensors like these."""
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(like, _begins(like), strict=False)
    ]
