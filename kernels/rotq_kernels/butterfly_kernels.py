# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel of ``butterfly``: all stages along runs."""

import triton
import triton.language as tl


@triton.jit
def butterfly_kernel(
    x_ptr,
    signs_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    num_runs,
    stride_xr,
    M,
    HAS_SIGNS: tl.constexpr,
    LOG_P: tl.constexpr,
    P: tl.constexpr,
    RUNS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    j = tl.arange(0, P)
    first = (run % M) * P
    inside = (run < num_runs)[:, None] & (j < P)[None, :]
    source = (run // M * stride_xr + first)[:, None] + j[None, :]
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)  # [RUNS, P]
    if HAS_SIGNS:
        x *= tl.load(signs_ptr + first[:, None] + j[None, :], mask=inside, other=0).to(tl.float32)
    pair = (first // 2)[:, None] + tl.arange(0, P // 2)[None, :]
    for stage in tl.static_range(LOG_P):
        # runs beyond the last have run % M < M as well, so that every angle that is read exists
        c = tl.load(cos_ptr + stage * M * (P // 2) + pair)  # [RUNS, P // 2]
        s = tl.load(sin_ptr + stage * M * (P // 2) + pair)
        a, b = tl.split(tl.reshape(x, (RUNS, P // 2, 2)))
        both = tl.join(c * a + s * b, s * a - c * b)
        x = tl.reshape(tl.permute(both, (0, 2, 1)), (RUNS, P))
    tl.store(y_ptr + run[:, None] * P + j[None, :], x.to(y_ptr.dtype.element_ty), mask=inside)
