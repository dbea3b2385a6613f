"""Give freed memory back to the system, so that a job's resident memory is what it uses."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LARGE_BLOCK = 8 << 20
_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""


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
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def map_large_blocks() -> None:
    """Under glibc, give every block from LARGE_BLOCK on a mapping of its own, for good.

    On its heap a freed tensor does not fit a new one of the same size, because torch asks for
    aligned blocks, so that matrices which come and go take twice the memory they need.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


def _libc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
