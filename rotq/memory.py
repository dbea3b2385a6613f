"""Give freed memory back to the system, so that a job's resident memory is what it uses."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def release_memory() -> None:
    """Collect garbage, and give back what that freed."""
    gc.collect()
    trim_memory()


@contextmanager
def settled_objects() -> Iterator[None]:
    """Leave the objects of now out of garbage collections: imports alone are 400,000 of them."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_memory() -> None:
    """Under glibc, return the allocator's free pages.

    glibc keeps freed blocks of up to 32 MiB; a job that allocates many sizes would otherwise hold
    a few hundred MB that nothing uses.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
