"""What launchers share. They import their kernels, and with them Triton, when they are called."""

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor


class TritonMissing(RuntimeError):  # noqa: N818
    """A kernel was asked for where Triton is not installed; the message says what to install."""


def require_triton() -> None:
    """Before a launcher imports its kernels.

    Raises:
        TritonMissing: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise TritonMissing(
            "rotq's kernels for GPUs need Triton, which is not installed: "
            "pip install triton (on Windows: pip install triton-windows)"
        )


def is_native() -> bool:
    """Whether there is native code for CPUs: numba is installed, and this is no process of vLLM.

    vLLM 0.32 reads the ``__dict__`` of whatever all modules hold, and fails at llvmlite's.
    """
    return "vllm" not in sys.modules and importlib.util.find_spec("numba") is not None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    on: Tensor,
    **named: Any,
) -> None:
    """Launch a kernel on the device and stream of a tensor: the only way to.

    Triton itself launches on the current device, wherever the arguments are. ``enable_fp_fusion``,
    whether a product and a sum may become one instruction that rounds once, is always said: 3.9
    warns where it is not, because 3.10 changes what that means.

    Args:
        kernel: Of Triton.
        grid: Its programs.
        *arguments: Its arguments, in order.
        on: One of the tensors among them.
        **named: Arguments by name, and Triton's options, ``enable_fp_fusion`` if it shall be False.
    """
    with torch.cuda.device_of(on):
        kernel[grid](*arguments, **{"enable_fp_fusion": True} | named)


def next_power_of_two(number: int) -> int:
    """The least that is not below ``number``, which is positive."""
    return 1 << (number - 1).bit_length()
