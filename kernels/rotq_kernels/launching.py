"""What launchers share. They import their kernels, and with them Triton, when they are called."""

import importlib.util


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
    """Whether there is native code for CPUs: numba is installed."""
    return importlib.util.find_spec("numba") is not None


def next_power_of_two(number: int) -> int:
    """The least that is not below ``number``, which is positive."""
    return 1 << (number - 1).bit_length()
