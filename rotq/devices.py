"""Devices by name: how they are spelled, which one ``auto`` is, and what this machine has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AUTO = "auto"
SPELLINGS = "auto, cpu, cuda, cuda:N or mps"


def check_device_name(name: str) -> None:
    """Raise ValueError where a name is none of ``SPELLINGS``; what is there is not looked at."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name, re.ASCII):
        raise ValueError(f"{name!r} is not {SPELLINGS}")


def choose_device(name: str, *, in_double: str = "") -> torch.device:
    """The torch device of ``--device``, with its number; ``auto`` is the first GPU, else mps or
    the CPU.

    Args:
        name: As ``check_device_name`` takes it.
        in_double: What must compute there in fp64, as a message calls it; mps does not.

    Raises:
        ValueError: it is no such name.
        RotqError: this machine does not have it, or it has no fp64.
    """
    check_device_name(name)
    if name == AUTO:
        first = usable_device(_first_choice())
        return first if has_double(first) or not in_double else usable_device("cpu")
    chosen = usable_device(name)
    if in_double and not has_double(chosen):
        raise RotqError(f"--device {name} has no fp64, which {in_double} needs; use --device cpu")
    return chosen


def usable_device(name: str, option: str = "--device") -> torch.device:
    """The torch device of any name that torch knows, with its number, as its tensors have it.

    Args:
        name: Of the device.
        option: That it was given with, for the message.

    Raises:
        RotqError: torch knows no such device, or this machine does not have it.
    """
    import torch

    try:
        made = torch.empty(1, device=torch.device(name))
        made.tolist()  # which meta has no values for
    except (RuntimeError, AssertionError, NotImplementedError):
        # what torch says of a device that is missing names its own build, and is of all these kinds
        raise RotqError(f"{option} {name}: this machine has none that torch can use") from None
    return made.device


def has_double(device: torch.device) -> bool:
    """Whether a device computes in fp64; Apple's mps does not."""
    return device.type != "mps"


def exact_device(device: torch.device) -> torch.device:
    """Where fp64 is computed for a device: there, or on the CPU."""
    return device if has_double(device) else usable_device("cpu")


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has products of matrices in a dtype.

    A CPU without them makes those of 16 bits number by number, several times as slow as in fp32
    (docs/speed.md).
    """
    import torch

    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        found = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    except AttributeError:  # a torch without oneDNN
        return False
    return bool(found)


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype in which a device computes fast, and every value of ``dtype`` exists."""
    import torch

    return dtype if multiplies(dtype, device) else torch.float32


def slow_products(dtype: torch.dtype, computed: torch.dtype, device: torch.device) -> Iterator[str]:
    """A line where a CPU has no products in a model's dtype, and what is computed in."""
    name, other = (str(each).removeprefix("torch.") for each in (dtype, computed))
    if multiplies(dtype, device):
        return
    if computed == dtype:
        yield f"this CPU multiplies no {name} numbers; --dtype float32 is several times as fast"
    else:
        yield (
            f"this CPU multiplies no {name} numbers: computed in {other}, which is several times "
            f"as fast; --dtype {name} insists"
        )


def double(x: Tensor) -> Tensor:
    """In fp64: where the tensor is, or on the CPU where its device has none."""
    return x.double() if has_double(x.device) else x.cpu().double()


def _first_choice() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
