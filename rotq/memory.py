"""Give freed memory back to the system, so that a job's resident memory is what it uses."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collect garbage, and give back what that freed."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Under glibc, return the allocator's free pages.

    glibc keeps freed blocks of up to 32 MiB; a job that allocates many sizes would otherwise hold
    a few hundred MB that nothing uses.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
