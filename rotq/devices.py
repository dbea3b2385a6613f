"""Devices by name, refused where this machine has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The torch device of a name such as ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        RotqError: torch knows no such device, or this machine does not have it.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise RotqError(f"device {name}: torch has no device of this name") from None
    if device.type == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= present:
            found = f"{present} of the kind" if present else "none that torch can use"
            raise RotqError(f"--device {name}: this machine has {found}")
    return device
