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


class Known(dict[Any, tuple[Any, tuple[Any, ...]]]):
    """Compiled kernels and their constants, by the kernel's id; a copy knows nothing."""

    def __reduce__(self) -> tuple[type["Known"], tuple[()]]:
        """For copies and pickles, as compiled kernels belong to a process and a device."""
        return Known, ()


ALIGNED = 16
"""Bytes; Triton compiles for addresses that are multiples of it."""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    on: Tensor,
    known: Any = None,
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
        known: A ``Known``, kept by who launches again and again with arguments for which Triton
            compiles the same; it would look at each of them each time, for 10 to 30 us. Who keeps
            it is right about that: constants, types, alignment, and what of integers is
            specialized. The grid has three numbers then, and all but constants are in order.
        **named: Arguments by name, and Triton's options, ``enable_fp_fusion`` if it shall be False.
    """
    with torch.cuda.device_of(on):
        if known is not None and id(kernel) in known:
            compiled, constants = known[id(kernel)]
            compiled[grid](*arguments, *constants)
            return
        compiled = kernel[grid](*arguments, **{"enable_fp_fusion": True} | named)
    # the interpreter compiles nothing
    if known is not None and compiled is not None:
        known[id(kernel)] = (
            compiled,
            tuple(named[name] for name in kernel.arg_names[len(arguments) :]),
        )


def next_power_of_two(number: int) -> int:
    """The least that is not below ``number``, which is positive."""
    return 1 << (number - 1).bit_length()
