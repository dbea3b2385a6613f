"""What a job gives back to the system; each in a process of its own, since settings stay."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from rotq.memory import large_blocks_mapped, trim_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

def freed_among_kept():
    before, kept, freed = resident(), [], []
    for _ in range(10):
        freed.append(torch.ones(10 << 20, dtype=torch.uint8))
        kept.append(torch.ones(1 << 20, dtype=torch.uint8))
    del freed
    print(resident() - before)
    trim_memory()
    print(resident() - before)

torch.ones(20 << 20, dtype=torch.uint8)  # glibc raises its threshold when this one is freed
if sys.argv[1] == "mapped":
    with large_blocks_mapped():
        freed_among_kept()
else:
    with large_blocks_mapped():
        pass
    freed_among_kept()
"""


def held(setting: str) -> tuple[int, int]:
    """MB that 100 MB of freed tensors still take, before and after trimming."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, setting], capture_output=True, text=True, check=True
    )
    before, after = map(int, ran.stdout.split())
    return before, after


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_blocks_return_when_freed():
    before, _ = held("mapped")
    assert before < 30


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_trimming_returns_what_was_freed():
    before, after = held("as-is")
    assert before > 80, (
        "glibc gives freed blocks back by itself, or they are mapped outside of the context too"
    )
    assert after < 30
