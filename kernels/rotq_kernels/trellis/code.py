"""The bitshift trellis of weights, and its code "mul1".

Down each column of a weight the rows form rings. A row has a symbol of ``bits`` bits, and its state
is the ``state_bits`` bits L of the ring that begin with them, least significant first:

    state_n = sum_i symbol_(n + i) 2^(i bits)  mod 2^L,        indices around the ring

so that the states of neighbours share L - bits bits, and a ring of R rows takes R bits bits: no
state is stored beside it. (QTIP, arXiv 2406.11235, with tail-biting; its paths here go from the
last row of a ring to the first, so that a state is read from the stream with a shift and a mask.)
What a state stands for is arithmetic on it alone ("mul1", exllamav3):

    y = 0x83DCD12D state mod 2^32,      level = (sum of the four bytes of y - 510) / 128

The sum of four even bytes is near to normal. Levels have standard deviation 1.15, and are exact in
fp16; exllamav3 divides by 147.7 instead, which is a matter of the scales.

Shape suffixes: N rows of a weight, K columns, C rings, R rows of a ring.
"""

import math

import torch
from torch import Tensor

MULTIPLIER = 0x83DCD12D
CENTRE, UNIT = 510, 128

RING = 256
"""A ring has at least so many rows, where the weight has them."""

STATE_BITS = (8, 16)
"""Fewest and most."""


def ring_rows(num_rows: int) -> int:
    """Rows of each ring of a weight: the least divisor of its rows from ``RING`` on, all if none.

    Of divisors those are taken whose rings end with a whole int32 word whatever the bits are.
    """
    fitting = (rows for rows in range(RING, num_rows, 32) if num_rows % rows == 0)
    return next(fitting, num_rows)


def code_levels(state_bits: int, device: torch.device | None = None) -> Tensor:
    """fp32 (2^L): what each state stands for.

    Raises:
        ValueError: not 8 to 16 bits.
    """
    if not STATE_BITS[0] <= state_bits <= STATE_BITS[1]:
        raise ValueError(f"states have {STATE_BITS[0]} to {STATE_BITS[1]} bits, got {state_bits}")
    y = (torch.arange(2**state_bits, device=device) * MULTIPLIER) & 0xFFFFFFFF
    total = sum(((y >> shift) & 255) for shift in (0, 8, 16, 24))
    return (total - CENTRE).float() / UNIT  # type: ignore[union-attr]


def path_states(symbol_NK: Tensor, bits: int, state_bits: int, rows: int) -> Tensor:
    """int32 (N, K) states.

    Args:
        symbol_NK: int8, symbol - 2^(bits-1), as ``layout.unpack`` gives codes.
        rows: R, of each ring; divides N.
    """
    symbol_CRK = symbol_NK.unflatten(0, (-1, rows)).to(torch.int32).add_(2 ** (bits - 1))
    state_CRK = symbol_CRK.clone()
    for step in range(1, math.ceil(state_bits / bits)):
        state_CRK |= symbol_CRK.roll(-step, dims=1) << (bits * step)
    return state_CRK.bitwise_and_(2**state_bits - 1).flatten(0, 1)


def path_levels(symbol_NK: Tensor, bits: int, state_bits: int, rows: int | None = None) -> Tensor:
    """fp32 (N, K): what the paths stand for, before scales.

    Args:
        symbol_NK: int8, symbol - 2^(bits-1).
        rows: R, of each ring; None: as ``ring_rows`` has it for N.
    """
    rows = rows or ring_rows(len(symbol_NK))
    state_NK = path_states(symbol_NK, bits, state_bits, rows)
    levels = code_levels(state_bits, symbol_NK.device)
    return levels.index_select(0, state_NK.flatten()).view(state_NK.shape)


def check_ring(rows: int, bits: int, state_bits: int) -> None:
    """Refuse a ring that is shorter than a state.

    Raises:
        ValueError: names the rows that it needs.
    """
    if rows * bits < state_bits:
        needed = math.ceil(state_bits / bits)
        raise ValueError(
            f"{rows} rows of {bits} bits are shorter than a state of {state_bits} bits; "
            f"at least {needed} rows are needed"
        )
