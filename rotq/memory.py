"""Give freed memory back to the system, so that a job's resident memory is what it uses."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -3, 32 << 20
"""Of glibc's malloc.h; the second is where glibc itself gets to once large blocks were freed."""


def release_memory() -> None:
    """Collect garbage, and give back what that freed."""
    gc.collect()
    trim_memory()


def physical_memory() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


@contextmanager
def large_blocks_mapped(smallest: int = 8 << 20) -> Iterator[None]:
    """Under glibc, give blocks from ``smallest`` bytes on a mapping of their own.

    On its heap a freed tensor does not fit a new one of the same size, because torch asks for
    aligned blocks, so that matrices which come and go take twice the memory they need. Each mapping
    costs page faults: for what allocates few large blocks.
    """
    mallopt = _libc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, smallest)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now, as Linux counts them; None elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def available_memory() -> int | None:
    """Bytes that a process can take without swapping, as Linux estimates; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def _libc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
