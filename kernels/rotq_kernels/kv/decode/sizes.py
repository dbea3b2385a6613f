"""Sizes of the decode kernels' tiles."""

from functools import cache

import torch
from torch import Tensor

from rotq_kernels.kv.decode.splits import MOST_SPLITS
from rotq_kernels.launching import next_power_of_two

MAX_ROWS = 16
"""Query rows of a KV head, heads by tokens, that a decode kernel takes as one tile."""

COLUMNS = 32
"""Elements of the query, and of the output, that a program turns."""


def tile_sizes(D: int, rows: int, *, has_ptx: bool, exact: bool) -> dict[str, int]:
    """Sizes of the decode kernel's tile: query rows N, tokens TILE, and WARPS.

    Args:
        D: Head width.
        rows: Query rows of a KV head, at most MAX_ROWS.
        has_ptx: Whether the GPU is NVIDIA's.
        exact: fp32 queries, which of wide heads take so much shared memory that a small GPU holds
            half of a tile.
    """
    warps = 2 if exact and D > 128 else 4
    # 16 lines of codes a warp; heads of one or two chunks put four or two tokens on a line
    tokens = 16 * warps * max(1, 4 // -(-D // 32))
    return {"N": 8 if rows <= 8 and has_ptx else MAX_ROWS, "TILE": tokens, "WARPS": warps}


def turn_sizes(D: int, *, exact: bool) -> dict[str, int]:
    """Dense tokens at a time, and stages: of wide fp32 heads as many as a small GPU holds."""
    return {"TILE": 16, "num_stages": 1} if exact and D > 128 else {"TILE": 32, "num_stages": 3}


def merge_sizes(D: int, rows: int) -> dict[str, int]:
    """Sizes of the merge's tile, however many partial results there are.

    N rows, P maxima and PARTS sums at a time, BLOCK elements.
    """
    n = next_power_of_two(rows)
    parts = min(32, max(1, 16384 // (n * next_power_of_two(D))))
    return {"N": n, "P": MOST_SPLITS, "PARTS": parts, "BLOCK": COLUMNS}


def has_ptx(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU of NVIDIA's."""
    return tensor.is_cuda and torch.version.hip is None


@cache
def lane_order(*, has_ptx: bool) -> dict[str, bool]:
    """How the Triton that is there hands the keys' codes to lanes; right or wrong, results are so.

    What a lane has loaded is its part of the products' operand if it was loaded in the order in
    which the compiler lays that out, or else it goes through shared memory, byte by byte: the loop
    is twice as long then (docs/gpu.md). Before 3.8 lanes hold bytes of an operand that was joined
    in eights (PAIRS of quads), since then in fours; before 3.7 neighbours of a tensor without
    contiguous addresses are those along its first axis (TURNED), since then along its last.
    """
    if not has_ptx:
        return {"PAIRS": False, "TURNED": False}
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return {"PAIRS": version < (3, 8), "TURNED": version < (3, 7)}


def precision(exact: bool) -> str:
    """Of products of fp32 tiles. tf32 holds 16-bit floats as they are; AMD has no three passes."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if exact else "tf32"
