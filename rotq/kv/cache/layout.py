"""Where one forward pass finds its tokens, and where it puts them.

Shape suffixes: B sequences, T fresh columns, N dense columns, E columns to be coded, J pages of a
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

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
            moved: dict[str, Any] = {
                name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)
            }
            self.elsewhere[device] = replace(self, **moved)
        return self.elsewhere[device]
