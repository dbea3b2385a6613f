# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The partial results of all splits, and of the dense tokens, merged into the output.

The sums over packed tokens are in the rotated basis of the values. With weights w of each split
that bring its maximum to that of all,

    out = (A_v^-1 sum w sums_packed + mean sum w weight_packed + w sums_dense) / sum w weight

so that the inverse is applied once to each query row. Rows that see no token become zero. Maxima
are loaded P splits at a time and sums PARTS, so that their latency is paid for once for all of
these; of splits beyond a sequence's last token no sums are loaded. Neither number depends on how
many splits there are, so that a text of any length meets one compiled kernel.

Letters: B sequences, H KV heads, N query rows of a KV head, D head width, WIDTH that padded to a
power of two, BLOCK elements of the output.
"""

import triton
import triton.language as tl

_NOTHING = tl.constexpr(-1e30)
"""As of ``kernel`` and ``turn``."""

_ROWS = tl.constexpr(16)
"""Rows of the least product that tensor cores take."""


@triton.jit(do_not_specialize=["rows", "packed", "partials"])
def merge_kernel(
    sums_ptr,
    peak_ptr,
    weight_ptr,
    constant_ptr,
    inverse_ptr,
    mean_ptr,
    out_ptr,
    H,
    rows,
    packed,
    partials,
    D: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK elements of the rows of a head; ``packed`` of the ``partials`` are of packed tokens."""
    WIDTH: tl.constexpr = triton.next_power_of_2(D)
    bh, head = tl.program_id(0), tl.program_id(0) % H
    n, j = tl.arange(0, N), tl.arange(0, WIDTH)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    spot = bh.to(tl.int64) * partials * rows + n
    constant = tl.zeros([N], tl.float32)
    if constant_ptr is not None:
        constant = tl.load(constant_ptr + bh.to(tl.int64) * rows + n, mask=n < rows, other=0.0)

    top = tl.full([N], _NOTHING, tl.float32)
    if partials > packed:
        top = tl.load(peak_ptr + spot + packed * rows, mask=n < rows, other=_NOTHING)
    last = 0
    for part in range(0, packed, P):
        p = part + tl.arange(0, P)
        there = (p < packed)[:, None] & (n < rows)[None, :]
        peak = tl.load(peak_ptr + spot[None, :] + p[:, None] * rows, mask=there, other=_NOTHING)
        saw = peak > _NOTHING
        top = tl.maximum(top, tl.max(tl.where(saw, peak + constant[None, :], _NOTHING), axis=0))
        last = tl.maximum(last, tl.max(tl.max(tl.where(saw, p[:, None] + 1, 0), axis=0), axis=0))

    turned = tl.zeros([N, WIDTH], tl.float32)
    share = tl.zeros([N], tl.float32)
    for part in range(0, last, PARTS):
        q = part + tl.arange(0, PARTS)
        place = spot[None, :] + q[:, None] * rows
        inside = (q < packed)[:, None] & (n < rows)[None, :]
        own = tl.load(peak_ptr + place, mask=inside, other=_NOTHING)
        fade = tl.where(own > _NOTHING, tl.exp2(own + constant[None, :] - top[None, :]), 0.0)
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
        share += tl.sum(fade * weight, axis=0)
        sums = tl.load(
            sums_ptr + place[:, :, None] * D + j[None, None, :],
            mask=(own > _NOTHING)[:, :, None] & (j < D)[None, None, :],
            other=0.0,
        )
        # [PARTS, N, WIDTH] -> [N, WIDTH]
        turned += tl.sum(fade[:, :, None] * sums, axis=0)
    within = (j < D)[:, None] & (d < D)[None, :]
    inverse_ptr += head * D * D
    inverse = tl.load(inverse_ptr + d[None, :] * D + j[:, None], mask=within, other=0.0)
    # a product of fewer rows than tensor cores take has them several times: [N, WIDTH] -> [16, ...]
    turned = tl.broadcast_to(turned[None, :, :], (_ROWS // N, N, WIDTH)).reshape(_ROWS, WIDTH)
    # [16, WIDTH] @ [WIDTH, BLOCK] -> [16, BLOCK] -> [16 / N, N, BLOCK] -> [N, BLOCK]
    found = tl.dot(turned, inverse, input_precision=PRECISION).reshape(_ROWS // N, N, BLOCK)
    out = tl.max(found, axis=0)
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)
    out += share[:, None] * mean[None, :]
    inside = (n < rows)[:, None] & (d < D)[None, :]
    total = share
    if partials > packed:
        row = spot + packed * rows
        own = tl.load(peak_ptr + row, mask=n < rows, other=_NOTHING)
        fade = tl.where(own > _NOTHING, tl.exp2(own - top), 0.0)
        total += fade * tl.load(weight_ptr + row, mask=n < rows, other=0.0)
        whole = tl.load(sums_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        out += fade[:, None] * whole
    out /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + (bh.to(tl.int64) * rows + n)[:, None] * D + d[None, :], out, mask=inside)
