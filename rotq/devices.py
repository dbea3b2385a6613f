"""Devices by name, refused where this machine has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch


def usable_device(name: str, option: str = "--device") -> torch.device:
    """The torch device of a name such as ``cpu``, ``cuda`` or ``cuda:1``.

    Args:
        name: Of the device.
        option: That it was given with, for the message.

    Raises:
        RotqError: torch knows no such device, or this machine does not have it.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # which meta has no values for
    except (RuntimeError, AssertionError, NotImplementedError):
        # what torch says of a device that is missing names its own build, and is of all these kinds
        raise RotqError(f"{option} {name}: this machine has none that torch can use") from None
    return device
