"""What a GPU would allow a kernel to reach, from static counts: a model, not a measurement.

Each SM gets its share of the memory's bandwidth, which is so many cache elements per clock. An
element costs ``instructions`` lane-instructions, of which ``integer`` on the narrow pipe, and
``shared`` bytes of shared memory; each resource allows a rate, and the lowest one is compared
with the memory's. Latency, bank conflicts and tensor cores (with what they read of shared memory
by themselves) are not modelled; expect 0.75 to 0.9 of what it says.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU; rates are per clock and per SM (or CU)."""

    name: str
    bytes_per_second: float
    num_sm: int
    clock: float
    """Hz."""
    issue: int | None
    """Lane-instructions; None where pipes issue independently."""
    integer: int
    """Lanes of the narrow pipe."""
    shared: int
    """Bytes of shared memory."""
    lanes: int
    """Of a warp."""
    registers: int
    """Of an SM, in lanes."""
    shared_size: int
    """Bytes of an SM."""
    block_shared: int
    """Bytes that a block may have at most: a launch that wants more fails."""
    max_warps: int
    max_blocks: int = 32

    def elements_per_clock(self, bits: float) -> float:
        """Elements that the memory delivers to an SM in a clock."""
        return self.bytes_per_second / (self.num_sm * self.clock) * 8 / bits


DEVICES = {
    "sm_80": Device(
        name="A100-80",
        bytes_per_second=2.04e12,
        num_sm=108,
        clock=1.41e9,
        issue=128,
        integer=64,
        shared=128,
        lanes=32,
        registers=65536,
        shared_size=164 * 1024,
        block_shared=163 * 1024,
        max_warps=64,
    ),
    "sm_89": Device(
        name="L40S",
        bytes_per_second=0.864e12,
        num_sm=142,
        clock=2.52e9,
        issue=128,
        integer=64,
        shared=128,
        lanes=32,
        registers=65536,
        shared_size=100 * 1024,
        block_shared=99 * 1024,
        max_warps=48,
        max_blocks=24,
    ),
    "sm_90": Device(
        name="H100 SXM",
        bytes_per_second=3.35e12,
        num_sm=132,
        clock=1.755e9,
        issue=128,
        integer=64,
        shared=128,
        lanes=32,
        registers=65536,
        shared_size=228 * 1024,
        block_shared=227 * 1024,
        max_warps=64,
    ),
    "sm_100": Device(
        name="B200",
        bytes_per_second=8e12,
        num_sm=148,
        clock=1.965e9,
        issue=128,
        integer=64,
        shared=128,
        lanes=32,
        registers=65536,
        shared_size=228 * 1024,
        block_shared=227 * 1024,
        max_warps=64,
    ),
    "sm_120": Device(
        name="RTX 5090",
        bytes_per_second=1.79e12,
        num_sm=170,
        clock=2.41e9,
        issue=128,
        integer=64,
        shared=128,
        lanes=32,
        registers=65536,
        shared_size=100 * 1024,
        block_shared=99 * 1024,
        max_warps=48,
        max_blocks=24,
    ),
    "gfx942": Device(
        name="MI300X",
        bytes_per_second=5.3e12,
        num_sm=304,
        clock=2.1e9,
        issue=None,
        integer=64,
        shared=128,
        lanes=64,
        registers=4 * 512 * 64,
        shared_size=64 * 1024,
        block_shared=64 * 1024,
        max_warps=32,
    ),
}
"""By compilation target."""

RESERVED_SHARED = 1024
"""Bytes that CUDA takes of each block."""


def roofline_share(
    device: Device, bits: float, *, instructions: float, integer: float, shared: float
) -> float:
    """Modelled share of the memory's bandwidth, at most 1; all costs are per element."""
    rates = [device.integer / integer if integer else float("inf")]
    if device.issue is not None and instructions:
        rates.append(device.issue / instructions)
    if shared:
        rates.append(device.shared / shared)
    return min(1.0, min(rates) / device.elements_per_clock(bits))


def occupancy(device: Device, *, registers: int, shared: int, num_warps: int) -> float:
    """Modelled share of the warps that an SM can hold; registers are those of a lane."""
    # registers are handed out to warps in units of 8 per lane
    warp_registers = -(-max(registers, 1) // 8) * 8 * device.lanes
    by_registers = device.registers // warp_registers // num_warps
    reserved = RESERVED_SHARED if device.lanes == 32 else 0
    by_shared = device.shared_size // (shared + reserved) if shared + reserved else 32
    by_warps = device.max_warps // num_warps
    blocks = min(by_registers, by_shared, by_warps, device.max_blocks)
    return blocks * num_warps / device.max_warps
