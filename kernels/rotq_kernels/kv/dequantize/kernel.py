# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel that turns codes of keys or of values back into these.

One program takes a tile of tokens of one KV head: levels as they are unpacked, which fp16 holds
exactly, their product with A^-1 a block of columns at a time, which two fp16 hold to 22 bits, then
the norm and the mean, turned to each token's position as ``encode`` turned it. The definition is
``encode.reference.dequantize_kv_reference``.

Letters: TILE tokens of a program, D head width, WIDTH that padded to chunks of 32, a power of two
of them, BLOCK columns, R rotary pairs, H KV heads.
"""

import triton
import triton.language as tl

from rotq_kernels.kv.encode.tile import turned_mean
from rotq_kernels.kv.paging import load_norms, load_page, past_gaps, rows_of
from rotq_kernels.kv.prefill.tile import element_of, load_levels
from rotq_kernels.kv.unpack import load_table

_LOW = tl.constexpr(2048.0)
"""What the second fp16 is multiplied by, so that it is in the range of the first."""


@triton.jit(do_not_specialize=["table_width", "packed", "held"])
def dequantize_kernel(
    codes_ptr,
    norm_ptr,
    table_ptr,
    base_ptr,
    inverse_ptr,
    mean_ptr,
    inv_freq_ptr,
    page_table_ptr,
    start_ptr,
    out_ptr,
    H,
    table_width,
    packed,
    held,
    rotary_scale,
    gap_codes,
    gap_norm,
    D: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """The first ``packed`` of ``held`` tokens that there is room for, (B, H, held, D)."""
    WIDTH: tl.constexpr = 32 * triton.next_power_of_2((D + 31) // 32)
    bh = tl.program_id(1)
    b, head = bh // H, bh % H
    t0, i = tl.program_id(0) * TILE, tl.arange(0, TILE)
    page_table_ptr += b.to(tl.int64) * table_width
    page = load_page(page_table_ptr, t0, i, packed, PAGE, TILE)
    row = rows_of(page, t0, i, head, H, PAGE, TILE)
    table = load_table(table_ptr, head, BITS)
    levels = load_levels(past_gaps(codes_ptr, page, gap_codes), row, table, D, BITS, False, PTX)
    there = t0 + i < packed
    base = tl.load(base_ptr + head)
    norm = load_norms(norm_ptr, page, gap_norm, row, there, base, 1.0)
    position = tl.load(start_ptr + b) + t0 + i

    e = element_of(tl.arange(0, WIDTH), BITS)
    inverse_ptr += head * D * D
    out_row = (bh.to(tl.int64) * held + t0 + i) * D
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        within = (e < D)[:, None] & (d < D)[None, :]
        inverse = tl.load(inverse_ptr + d[None, :] * D + e[:, None], mask=within, other=0.0)
        unit = tl.maximum(tl.max(tl.max(tl.abs(inverse), axis=0), axis=0), 1e-30)
        inverse /= unit
        high = inverse.to(tl.float16)
        low = ((inverse - high.to(tl.float32)) * _LOW).to(tl.float16)
        # [TILE, WIDTH] @ [WIDTH, BLOCK] -> [TILE, BLOCK]
        x = tl.dot(levels, high) + tl.dot(levels, low) * (1.0 / _LOW)
        x *= norm[:, None] * unit
        if R > 0:
            x += turned_mean(mean_ptr + head * D, inv_freq_ptr, position, d, rotary_scale, D, R)
        elif mean_ptr is not None:
            x += tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)[None, :]
        inside = there[:, None] & (d < D)[None, :]
        place = out_ptr + out_row[:, None] + d[None, :]
        tl.store(place, x.to(out_ptr.dtype.element_ty), mask=inside)
