"""What ``torch.autocast`` means for packed weights, keys and values.

Our operators are none of those that autocast knows. Products and attention compute in its dtype, as
torch's do there, so their inputs are brought to it; coding and reading codes is not to be rounded,
so autocast ends there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def lowered(x: Tensor) -> Tensor:
    """In the dtype that autocast, where it is on, lets products have; fp64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def switched_off(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
